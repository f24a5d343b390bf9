"""Which scores are shares, to be shown in percent, and how scores are written for tables.

A score from 0 to 1 need not be a share (CIDEr, which ends at 10, can be 0.8), and names alone do not tell either (some
tasks' accuracies end at 100): a share is what is listed here and lies between 0 and 1. All else is shown as it is.
"""

import math

SHARES = frozenset(
    {
        # of lmms-eval's tasks and metrics
        "exact_match", "acc", "acc_norm", "acc_all", "anls", "mmmu_acc", "pope_accuracy", "pope_precision",
        "pope_recall", "pope_f1_score", "pope_yes_ratio", "relaxed_overall", "relaxed_human_split",
        "relaxed_augmented_split", "seed_all", "seed_image", "seed_video",
        # of this package's tasks
        "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "parse_failure", "yes_no", "number", "other",
        "unanswerable",
    }
)  # fmt: skip
"""Names of metrics that are shares: means of values from 0 to 1, ratios of counts, or means of such ratios."""

PERCENT = 100
"""The `scale` of shares."""


def scale(metric: str, *values: float) -> int:
    """What scores are multiplied by for people: `PERCENT` where all are known to be shares, else 1."""
    return PERCENT if metric in SHARES and all(0 <= value <= 1 for value in values) else 1


def number_text(value: float, scale: int, decimals: int = 1, signed: bool = False) -> str:
    """A score, or a difference of scores: shares in percent with so many decimals, all else with five digits."""
    sign = "+" if signed else ""
    return f"{PERCENT * value:{sign}.{decimals}f}" if scale == PERCENT else f"{value:{sign}.5g}"


def score_text(value: float, error: float | None, scale: int) -> str:
    """A score with its standard error, where there is one."""
    known = error is not None and not math.isnan(error)
    return number_text(value, scale) + (f" ± {number_text(error, scale)}" if known else "")


def unit_text(scale: int) -> str:
    """The unit of a table's scores, in words."""
    return "in percent" if scale == PERCENT else "as lmms-eval gives it"
