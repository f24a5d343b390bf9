"""The ladder: from the layer-wise baseline to `qvlm_rotated` one choice after the other, each against the one below."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qvlm_plugin.plan_request import check_request
from qvlm_plugin.report.ablations.evaluation import Evaluated, Subject, evaluate, failures, notes_on
from qvlm_plugin.report.figures import Panel, Series, panels_figure
from qvlm_plugin.report.paired import difference_text, estimate_text, p_text
from qvlm_plugin.report.pooled import Pooled, pool, spread_text, verdict
from qvlm_plugin.report.results import Grid
from qvlm_plugin.report.runs import Cell, Setting
from qvlm_plugin.report.samples import RunSamples, read_samples
from qvlm_plugin.report.writing import Report


@dataclass(frozen=True)
class Rung:
    """A method with options.

    Attributes:
        name: what it adds to the rung below.
        method, options: as ``--model_args`` names them.
    """

    name: str
    method: str
    options: Mapping[str, str] = field(default_factory=dict)


_ROTATED = {"transform": "rotate", "activations": "token"}
_GPTQ = {**_ROTATED, "rounding": "gptq", "weight_clip": "mse", "group_size": "64"}

RUNGS = (
    Rung("qlora", "qlora"),
    Rung("+ rotation, per token", "rtn", {**_ROTATED, "weights": "nf"}),
    Rung("+ GPTQ", "rtn", _GPTQ),
    Rung("+ centers, biases", "rtn", {**_GPTQ, "center": "true", "bias_correction": "true"}),
    Rung("+ smoothing", "qvlm_rotated", {"cdm": "false"}),
    Rung("+ joint search", "qvlm_rotated"),
    Rung("+ VEO", "qvlm_rotated", {"veo": "true"}),
)
"""Bottom to top. With GPTQ weights become integers in groups of 64; before that they are normal-float, as qlora's."""

HEADER = ("scheme", "rung", "seeds", "score", "spread over seeds", "difference to the rung below", "p", "sign-flip p")


def ladder(
    subject: Subject, schemes: Sequence[str], seeds: Sequence[int], setting: Setting, command: str
) -> tuple[Report, list[Path]]:
    """Every rung at every scheme, over seeds of the calibration samples; scores are means over the tasks.

    Args:
        subject: its options are not read.
        schemes, seeds: of the runs.
        setting: where and how they run.
        command: that makes the report again.

    Returns:
        The report, and the logs of runs that failed.
    """
    todo = {(scheme, rung.name, seed): _cell(subject, scheme, rung, seed)
            for scheme in schemes for rung in RUNGS for seed in seeds}  # fmt: skip
    found = dict(zip(todo, evaluate([*todo.values()], setting), strict=True))
    metric = next(score.metric for one in found.values() for score in one.scores.values())
    rows, points, verdicts = [], {}, []
    for scheme in schemes:
        points[scheme] = []
        for below, rung in zip((None, *RUNGS), RUNGS, strict=False):
            pairs = _pairs(found, scheme, (below or rung).name, rung.name, seeds)
            if not pairs:
                continue
            pooled = pool(pairs, metric)[-1]
            points[scheme].append((rung, pooled))
            rows.append(_row(scheme, rung, pooled, first=below is None))
            if below is not None:
                verdicts.append(f"{scheme}: {verdict(pooled, rung.name.removeprefix('+ '), 'the rung below')}")
    report = Report(
        name="ladder",
        title="The ladder: what each choice adds",
        command=command,
        tables=[Grid(HEADER, tuple(rows))],
        rows=[_data(scheme, rung, pooled) for scheme, own in points.items() for rung, pooled in own],
        notes=[
            *notes_on(found.values()),
            "Scores are means over the tasks; intervals and p count documents and draws of calibration samples.",
        ],
        figure=panels_figure([[_panel(points)]]),
        verdicts=verdicts,
    )
    return report, failures(found.values())


def _cell(subject: Subject, scheme: str, rung: Rung, seed: int) -> Cell:
    check_request(rung.method, scheme, dict(rung.options))
    arguments = {
        "pretrained": subject.pretrained, "method": rung.method, "scheme": scheme,
        "calibration": subject.calibration, "seed": str(seed), **rung.options, **subject.model_args,
    }  # fmt: skip
    name = f"{scheme}-{RUNGS.index(rung)}-{seed}"
    return Cell(f"ladder-{name}", arguments, subject.tasks, subject.limit)


def _pairs(
    found: Mapping[tuple[str, str, int], Evaluated], scheme: str, below: str, name: str, seeds: Sequence[int]
) -> list[tuple[RunSamples, RunSamples]]:
    """The finished runs of a rung and of the one below, by seed."""
    pairs = []
    for seed in seeds:
        results = [found[scheme, one, seed].outcome.results for one in (below, name)]
        if all(results):
            pairs.append(tuple(read_samples(one)[0] for one in results))
    return pairs


def _row(scheme: str, rung: Rung, pooled: Pooled, first: bool) -> tuple[str, ...]:
    texts = (scheme, rung.name, str(pooled.seeds), estimate_text(pooled.score, pooled.scale), spread_text(pooled))
    if first:
        return (*texts, "", "", "")
    difference = difference_text(pooled.difference, pooled.scale, decimals=1)
    return (*texts, difference, p_text(pooled.t_p), p_text(pooled.sign_flip_p))


def _data(scheme: str, rung: Rung, pooled: Pooled) -> dict[str, object]:
    return {
        "scheme": scheme,
        "rung": rung.name,
        "method": rung.method,
        "options": dict(rung.options),
        "seeds": pooled.seeds,
        "scores": list(pooled.scores),
        "differences": list(pooled.differences),
        "p": pooled.t_p,
        "sign_flip_p": pooled.sign_flip_p,
    }


def _panel(points: Mapping[str, Sequence[tuple[Rung, Pooled]]]) -> Panel:
    series = []
    for scheme, own in points.items():
        steps = tuple(float(RUNGS.index(rung)) for rung, _ in own)
        scores = tuple(pooled.scale * pooled.score.value for _, pooled in own)
        errors = tuple(pooled.scale * pooled.score.error for _, pooled in own)
        series.append(Series(scheme, steps, scores, errors))
    return Panel("rung", "score", tuple(series), integers=True)
