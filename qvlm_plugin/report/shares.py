"""Tell which scores are shares, give their intervals, and format scores for tables.

Shares are shown in percent. A score between 0 and 1 need not be a share (CIDEr, whose maximum is 10, can be 0.8), nor
is every metric of a known name one (some tasks' accuracies go up to 100). So a score is a share if its metric is listed
here and it lies between 0 and 1. All other scores are shown as they are.
"""

import math
from statistics import NormalDist

SHARES = frozenset(
    {
        # metrics of lmms-eval's tasks
        "exact_match", "acc", "acc_norm", "acc_all", "anls", "mmmu_acc", "pope_accuracy", "pope_precision",
        "pope_recall", "pope_f1_score", "pope_yes_ratio", "relaxed_overall", "relaxed_human_split",
        "relaxed_augmented_split", "seed_all", "seed_image", "seed_video",
        # metrics of this package's tasks
        "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "parse_failure", "yes_no", "number", "other",
        "unanswerable",
    }
)  # fmt: skip
"""Names of metrics that are shares: means of values from 0 to 1, ratios of counts, or means of such ratios."""

PERCENT = 100
"""The `scale` of shares."""


def scale(metric: str, *values: float) -> int:
    """Factor by which tables multiply scores: `PERCENT` if all are shares, else 1."""
    return PERCENT if metric in SHARES and all(0 <= value <= 1 for value in values) else 1


def number_text(value: float, scale: int, decimals: int = 1, signed: bool = False) -> str:
    """A score, or a difference of scores: shares in percent with ``decimals``, others with five significant digits.

    A difference of shares that would round to 0 keeps one significant digit: its sign tells whether an interval
    includes 0. Differences below `NOISE` are 0.
    """
    sign = "+" if signed else ""
    if scale != PERCENT:
        return f"{value:{sign}.5g}"
    percent = PERCENT * value
    if signed and round(percent, decimals) == 0 and abs(percent) > NOISE:
        decimals = -math.floor(math.log10(abs(percent)))
    return f"{percent:{sign}z.{decimals}f}"


NOISE = 1e-6
"""Difference in percent that rounding errors of sums of scores explain."""

FEWEST = 5
"""Numbers of right and of wrong documents below which Wilson's interval replaces a share's standard error."""

Interval = tuple[float, float]
"""Lower and upper end."""


def wilson(share: float, count: float) -> Interval:
    """Wilson's 95 % interval of a share of ``count`` documents: for 4 of 4 it is 0.51 to 1; a standard error is 0."""
    z = NormalDist().inv_cdf(0.975) ** 2
    middle, reach = share + z / (2 * count), math.sqrt(z * share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - reach) / (1 + z / count)), min(1.0, (middle + reach) / (1 + z / count))


def share_interval(metric: str, value: float, error: float | None, documents: int | None) -> Interval | None:
    """Wilson's interval of a share of right documents, if fewer than `FEWEST` are right or wrong; else None.

    The standard error reveals how many documents were scored, and whether each was right or wrong: for n scores of 0
    and 1 it is √(p (1 - p) / (n - 1)), for others with the same mean it is smaller. It is 0 if all are right, or wrong.

    Args:
        metric: name of the metric.
        value, error: the score, and its standard error if known.
        documents: number of documents that have this metric; None if unknown.
    """
    if scale(metric, value) != PERCENT or error is None or math.isnan(error):
        return None
    spread = value * (1 - value)
    if spread and error:
        count = round(spread / error**2 + 1)
        right = value * count
        if count < 2 or abs(right - round(right)) > 1e-6 * count:
            return None
        if abs(math.sqrt(spread / (count - 1)) - error) > 1e-6 * error:
            return None
    elif spread or documents is None:
        return None
    else:
        count = documents
    return wilson(value, count) if count * min(value, 1 - value) < FEWEST else None


def score_text(value: float, error: float | None, scale: int, interval: Interval | None = None) -> str:
    """A score with its interval if given, else with its standard error unless that is 0 or unknown."""
    text = number_text(value, scale)
    if interval is not None:
        return f"{text} [{', '.join(number_text(end, scale) for end in interval)}]"
    return text + (f" ± {number_text(error, scale)}" if error is not None and error > 0 else "")


def unit_text(scale: int) -> str:
    """The unit of a table's scores, in words."""
    return "in percent" if scale == PERCENT else "as lmms-eval gives it"
