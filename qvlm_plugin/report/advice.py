"""Recommend a way to quantize a model, from the accuracy and the packed size of evaluated runs."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.estimates import difference_text
from qvlm_plugin.report.pooled import Pooled, pool
from qvlm_plugin.report.results import Grid, size
from qvlm_plugin.report.samples import RunSamples
from qvlm_plugin.report.shares import PERCENT, unit_text

SAME = ("model_fingerprint", "method", "scheme", "options", "backend", "dtype", "device")
"""Provenance that all runs of one choice share. They may differ in tasks and in the seed of the calibration draw."""

HEADER = ("method", "scheme", "calibration", "packed size", "tokens/s", "seeds", "documents", "difference", "verdict")


class Verdict(Enum):
    """Whether a choice loses more than the tolerance."""

    RECOMMENDED = "recommended"
    UNDECIDED = "undecided"
    WORSE = "loses more"


@dataclass(frozen=True)
class Choice:
    """One way to quantize a model, with the results of its runs.

    Attributes:
        model: the checkpoint's name.
        method, scheme: the method and scheme evaluated.
        calibration: source of the samples; empty if none were drawn.
        variant: options in which it differs from other choices of the same method, scheme and calibration.
        simulated: whether its runs simulate low bits, so that their speed is unknown.
        packed_bytes: size of the weights under the scheme; None if no run records it.
        tokens_per_second: mean over packed runs; None without packed runs.
        tasks: the tasks compared.
        pooled: score and difference from full precision, averaged over tasks and seeds.
    """

    model: str
    method: str
    scheme: str
    calibration: str
    variant: str
    simulated: bool
    packed_bytes: int | None
    tokens_per_second: float | None
    tasks: tuple[str, ...]
    pooled: Pooled

    @property
    def name(self) -> str:
        """The name used in sentences."""
        details = ", ".join(filter(None, (self.variant, self.calibration)))
        return f"{self.method} {self.scheme}" + (f" ({details})" if details else "")

    def verdict(self, tolerance: float) -> Verdict:
        """Whether the interval excludes a drop above ``tolerance``, given in the unit of tables (points for shares)."""
        low, high = (self.pooled.scale * edge for edge in (self.pooled.difference.low, self.pooled.difference.high))
        if low >= -tolerance:
            return Verdict.RECOMMENDED
        return Verdict.WORSE if high < -tolerance else Verdict.UNDECIDED

    def row(self, tolerance: float) -> dict[str, Any]:
        """The choice as JSON data; differences are in the metric's own unit."""
        low, high = self.pooled.difference.low, self.pooled.difference.high
        names = ("model", "method", "scheme", "calibration", "variant", "simulated", "packed_bytes")
        return {
            **{name: getattr(self, name) for name in names},
            "tokens_per_second": self.tokens_per_second,
            "tasks": [*self.tasks],
            "seeds": self.pooled.seeds,
            "documents": self.pooled.documents,
            "score": self.pooled.score.value,
            "difference": self.pooled.difference.value,
            "difference_low": None if math.isnan(low) else low,
            "difference_high": None if math.isnan(high) else high,
            "verdict": self.verdict(tolerance).value,
        }


@dataclass(frozen=True)
class _Runs:
    """The runs of one choice by seed; runs of the same seed are merged into one with all their tasks."""

    facts: Mapping[str, Any]
    by_seed: Mapping[Any, RunSamples]
    speeds: tuple[float, ...]


def find_choices(runs: Sequence[RunSamples], metric: str) -> tuple[list[Choice], list[str]]:
    """Compare each quantized choice with full precision of the same model, on the same documents.

    Args:
        runs: runs of any models, methods, tasks and seeds; those of other packages' models are left out.
        metric: name of the tasks' metric.

    Returns:
        The choices by packed size, and a line for each run or choice that cannot be compared.
    """
    known = [_joined(own) for own in _grouped(run for run in runs if run.run)]
    baselines = [group for group in known if group.facts["method"] == "none"]
    found, failed = [], defaultdict(list)
    for group in known:
        if group.facts["method"] == "none":
            continue
        try:
            found.append(_choice(group, baselines, metric))
        except QVLMError as error:
            failed[str(error)].append(f"{group.facts['method']} {group.facts['scheme']}")
    problems = [f"{run.file}: a model of another package; left out" for run in runs if not run.run]
    problems += [f"{', '.join(names)}: {message}" for message, names in failed.items()]
    return _with_variants(sorted(found, key=lambda pair: pair[0].packed_bytes or math.inf)), problems


def _grouped(runs: Iterable[RunSamples]) -> list[list[RunSamples]]:
    groups: dict[str, list[RunSamples]] = defaultdict(list)
    for run in runs:
        key = {name: run.run.get(name) for name in SAME} | {"source": _calibration(run.run).get("source")}
        groups[json.dumps(key, sort_keys=True, default=str)].append(run)
    return [*groups.values()]


def _calibration(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    return facts.get("calibration") or {}


def _joined(runs: Sequence[RunSamples]) -> _Runs:
    by_seed: dict[Any, RunSamples] = {}
    for run in sorted(runs, key=lambda run: run.file.name):  # names begin with the time: a task's newest run wins
        seed = _calibration(run.run).get("seed")
        tasks = {**by_seed[seed].tasks, **run.tasks} if seed in by_seed else run.tasks
        by_seed[seed] = replace(run, tasks=tasks)
    return _Runs(runs[0].run, by_seed, tuple(run.tokens_per_second for run in runs if run.tokens_per_second))


def _choice(group: _Runs, baselines: Sequence[_Runs], metric: str) -> tuple[Choice, Mapping[str, Any]]:
    facts, runs = group.facts, group.by_seed.values()
    if any(_calibration(run.run).get("documents_also_evaluated") for run in runs):
        raise QVLMError("calibrated on evaluated documents; left out")
    baseline = _baseline(facts, baselines)
    shared = set(baseline.tasks).intersection(*(run.tasks for run in runs))
    if not shared:
        raise QVLMError("full precision was evaluated on none of its tasks; left out")
    only = [replace(run, tasks={task: run.tasks[task] for task in sorted(shared)}) for run in (baseline, *runs)]
    *_, pooled = pool([(only[0], run) for run in only[1:]], metric)
    choice = Choice(
        model=str(facts.get("pretrained") or "model"),
        method=facts["method"],
        scheme=facts["scheme"],
        calibration=str(_calibration(facts).get("source") or ""),
        variant="",
        simulated=facts.get("backend") == "reference",
        packed_bytes=facts.get("packed_bytes"),
        tokens_per_second=sum(group.speeds) / len(group.speeds) if group.speeds else None,
        tasks=tuple(sorted(shared)),
        pooled=pooled,
    )
    return choice, facts


def _baseline(facts: Mapping[str, Any], baselines: Sequence[_Runs]) -> RunSamples:
    """The full-precision run of the same checkpoint, preferably with the same compute type and device."""
    own = [run for run in baselines if run.facts.get("model_fingerprint") == facts.get("model_fingerprint")]
    if not own:
        raise QVLMError("there is no run of method=none with the same checkpoint; left out")
    agreement = lambda run: sum(run.facts.get(name) == facts.get(name) for name in ("dtype", "device"))  # noqa: E731
    return next(iter(max(own, key=agreement).by_seed.values()))


def _with_variants(found: Sequence[tuple[Choice, Mapping[str, Any]]]) -> list[Choice]:
    """The choices; those with the same name get the options, backend, compute type or device in which they differ."""
    named: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    every = [{**(facts.get("options") or {}), **{name: facts.get(name) for name in SAME[4:]}} for _, facts in found]
    for (choice, _), options in zip(found, every, strict=True):
        named[choice.model, choice.name].append(options)
    choices = []
    for (choice, _), options in zip(found, every, strict=True):
        others = named[choice.model, choice.name]
        differing = [name for name in options if any(other.get(name) != options[name] for other in others)]
        choices.append(replace(choice, variant=", ".join(f"{name}={options[name]}" for name in differing)))
    return choices


def choices_grid(choices: Sequence[Choice], tolerance: float) -> Grid:
    """One row for each choice."""
    return Grid(HEADER, tuple(_cells(choice, tolerance) for choice in choices))


def _cells(choice: Choice, tolerance: float) -> tuple[str, ...]:
    pooled, speed = choice.pooled, choice.tokens_per_second
    return (
        f"{choice.method} ({choice.variant})" if choice.variant else choice.method,
        choice.scheme,
        choice.calibration,
        size(choice.packed_bytes),
        "simulated" if choice.simulated else "" if speed is None else f"{speed:.1f}",
        str(pooled.seeds),
        f"{pooled.documents:,}",
        difference_text(pooled.difference, pooled.scale, decimals=1),
        choice.verdict(tolerance).value,
    )


def advice(choices: Sequence[Choice], memory: float | None, tolerance: float) -> list[str]:
    """Sentences that say which choice to take for one model.

    Args:
        choices: all choices of one model.
        memory: limit of the weights' size in bytes; None for no limit.
        tolerance: accepted drop, in the unit of tables (points for shares).
    """
    fitting = [choice for choice in choices if memory is None or (choice.packed_bytes or math.inf) <= memory]
    if not fitting:
        return [_nothing_fits(choices, memory)]
    by_verdict = {
        verdict: [choice for choice in fitting if choice.verdict(tolerance) is verdict] for verdict in Verdict
    }
    recommended = sorted(
        by_verdict[Verdict.RECOMMENDED],
        key=lambda choice: (choice.packed_bytes or math.inf, -choice.pooled.difference.low),
    )
    unit = f" point{'s' * (tolerance != 1)}" if fitting[0].pooled.scale == PERCENT else ""
    budget = "" if memory is None else f" for {size(memory)}"
    if recommended:
        best, *others = recommended
        sentences = [
            f"Choose {_described(best)}{budget}: the smallest whose interval excludes a drop above {tolerance:g}{unit}."
        ]
        sentences += [f"Also recommended: {', '.join(map(_described, others))}."] * bool(others)
        if best.simulated:
            sentences.append(
                "Its runs simulate low bits: evaluate it with backend=auto for answers and speed as deployed."
            )
        if best.pooled.drawn and best.pooled.seeds == 1:
            sentences.append(
                "It was evaluated with one draw of calibration samples; another draw can change the result."
            )
    else:
        sentences = [f"No choice is recommended{budget}: no interval excludes a drop above {tolerance:g}{unit}."]
    if undecided := by_verdict[Verdict.UNDECIDED]:
        sentences.append(f"Undecided, needs more documents or seeds: {', '.join(map(_described, undecided))}.")
    return sentences


def _described(choice: Choice) -> str:
    return f"{choice.name}, {size(choice.packed_bytes)}"


def _nothing_fits(choices: Sequence[Choice], memory: float | None) -> str:
    sized = [choice for choice in choices if choice.packed_bytes is not None]
    if not sized:
        return "No run records its packed size, because an older version wrote it. Run the evaluation again."
    return f"No evaluated choice fits into {size(memory)}; the smallest is {_described(sized[0])}."


def notes(choices: Sequence[Choice]) -> list[str]:
    """Lines that explain the table."""
    tasks = sorted({", ".join(choice.tasks) for choice in choices})
    unit = "points" if all(choice.pooled.scale == PERCENT for choice in choices) else unit_text(1)
    lines = [
        f"Difference from full precision, {unit}, averaged over {' / '.join(tasks)}, with its 95 % interval: documents "
        "are clustered by image; several seeds also account for the draw of calibration samples.",
        "Packed size is that of the weights on disk. In memory, kernels store 2- and 3-bit weights in 4 bits and 5- to "
        "7-bit weights in 8; activations and the KV cache need more.",
    ]
    if len(tasks) > 1:
        lines.append("Rows cover different tasks; compare only rows that cover the same tasks.")
    return lines
