"""Which bits to use: what each quantized run loses against its size, and whether the evaluation can tell."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import read_json
from qvlm_plugin.report.leaderboard.schema import ResultsFile, parse_results
from qvlm_plugin.report.paired import Estimate, difference_text
from qvlm_plugin.report.pooled import Pooled, pool
from qvlm_plugin.report.results import Grid, size
from qvlm_plugin.report.samples import RunSamples
from qvlm_plugin.report.shares import PERCENT, number_text

KEPT, LOST, UNDECIDED = "within tolerance", "loses more", "undecided"


@dataclass(frozen=True)
class Option:
    """A method at a scheme, over the seeds that were evaluated.

    Attributes:
        method, scheme, backend: of its runs.
        pooled: its runs against full precision, on the average of the tasks.
        packed_bytes: the size of the model, everything counted: weights packed, all else in 16 bits. None where the
            runs do not record it.
        tokens_per_second: of packed runs, their mean; None where the arithmetic was simulated.
        judgement: `KEPT` where the 95 % interval of the difference lies within the tolerance, `LOST` where all of it
            lies below, else `UNDECIDED`.
    """

    method: str
    scheme: str
    backend: str | None
    pooled: Pooled
    packed_bytes: int | None
    tokens_per_second: float | None
    judgement: str

    @property
    def name(self) -> str:
        """For sentences."""
        return f"{self.method} {self.scheme}"

    @property
    def difference(self) -> str:
        """Of the scores, with its interval."""
        return difference_text(self.pooled.difference, self.pooled.scale)


def options_of(runs: Sequence[RunSamples], metric: str, tolerance: float) -> list[Option]:
    """What there is to choose from, the smallest first.

    Args:
        runs: of one model, one of them in full precision, all over the same documents; runs that differ in nothing but
            the seed of their calibration samples are one option.
        metric: of the tasks.
        tolerance: how much lower a score may be, in points where scores are shares, else in their unit.

    Raises:
        QVLMError: full precision is missing or there twice, nothing is quantized, the runs are of several models or of
            different documents, or the metric is missing.
    """
    facts = {run.file: parse_results(read_json(run.file), run.file) for run in runs}
    for run in runs:
        if run.run is None:
            raise QVLMError(f"{run.file} is not a run of qvlm_plugin: its method and size are not recorded")
    if len(models := {one.qvlm.model_fingerprint or one.qvlm.pretrained for one in facts.values()}) > 1:
        raise QVLMError(f"the runs are of {len(models)} models; name those of one")
    full = [run for run in runs if facts[run.file].qvlm.method == "none"]
    if len(full) != 1:
        raise QVLMError(f"there are {len(full)} runs of full precision (method none); name exactly one")
    groups: dict[str, list[RunSamples]] = defaultdict(list)
    for run in runs:
        if run is not full[0]:
            groups[_without_seed(facts[run.file])].append(run)
    if not groups:
        raise QVLMError("there is no run of a quantized model to choose from")
    found = [_option(full[0], own, [facts[run.file] for run in own], (metric, tolerance)) for own in groups.values()]
    return sorted(found, key=lambda one: (one.packed_bytes or math.inf, -one.pooled.difference.value))


def _without_seed(facts: ResultsFile) -> str:
    run = facts.qvlm
    source = run.calibration and run.calibration.model_dump(include={"source"})
    return json.dumps([run.method, run.scheme, run.options, run.backend, run.dtype, source], sort_keys=True)


def _option(
    full: RunSamples, runs: Sequence[RunSamples], facts: Sequence[ResultsFile], asked: tuple[str, float]
) -> Option:
    metric, tolerance = asked
    row = pool([(full, run) for run in runs], metric)[-1]
    speeds = [one.tokens_per_second for one in facts if one.tokens_per_second is not None]
    sizes = [one.qvlm.packed_bytes for one in facts if one.qvlm.packed_bytes is not None]
    return Option(
        method=facts[0].qvlm.method,
        scheme=facts[0].qvlm.scheme,
        backend=facts[0].qvlm.backend,
        pooled=row,
        packed_bytes=max(sizes) if sizes else None,
        tokens_per_second=sum(speeds) / len(speeds) if speeds else None,
        judgement=judge(row.difference, tolerance / row.scale),
    )


def judge(difference: Estimate, tolerance: float) -> str:
    """Whether a difference to full precision is within the tolerance, by its interval; NaN leaves it undecided."""
    if difference.low >= -tolerance:
        return KEPT
    return LOST if difference.high < -tolerance else UNDECIDED


def choose(options: Sequence[Option], memory: float | None) -> Option | None:
    """The option to use: of those within the tolerance the smallest; with a limit, of those that fit the most accurate.

    Accurate is what has the highest lower end of its interval. Where nothing is within the tolerance, the best of the
    undecided is taken.

    Args:
        options: see `options_of`.
        memory: bytes that the packed model may take; None sets no limit.

    Returns:
        None where nothing fits, or everything that fits loses more than the tolerance.
    """
    fitting = [one for one in options if one.packed_bytes is not None and one.packed_bytes <= (memory or math.inf)]
    for judgement in (KEPT, UNDECIDED):
        if able := [one for one in fitting if one.judgement == judgement]:
            if memory is None and judgement == KEPT:
                return min(able, key=lambda one: one.packed_bytes)
            return max(able, key=lambda one: (one.pooled.difference.low, one.pooled.difference.value))
    return None


def advice_text(options: Sequence[Option], memory: float | None, tolerance: float) -> str:
    """What to use and how sure that is, in one or two sentences."""
    sizes = [one.packed_bytes for one in options if one.packed_bytes is not None]
    if not sizes:
        return "No run records its packed size; evaluate again with this version."
    budget = "" if memory is None else f" in {size(int(memory))}"
    unit = " points" if options[0].pooled.scale == PERCENT else ""
    limit = f"{tolerance:g}{unit}"
    chosen = choose(options, memory)
    if chosen is None and min(sizes) > (memory or math.inf):
        return f"Nothing fits{budget}: the smallest is {options[0].name} with {size(options[0].packed_bytes)}."
    if chosen is None:
        return f"Nothing{budget and ' that fits' + budget} stays within {limit} of full precision."
    found = f"{chosen.name} ({size(chosen.packed_bytes)}, {chosen.difference}{unit} from full precision)"
    if chosen.judgement == KEPT:
        return f"Use {found}{budget and f': the most accurate{budget}'}. It stays within {limit}."
    return (
        f"Nothing{budget} is known to stay within {limit}. Closest is {found}: evaluate more documents or seeds to "
        f"decide. Its interval is {_width(chosen.pooled.difference, chosen.pooled.scale)}{unit} wide."
    )


def _width(estimate: Estimate, scale: int) -> str:
    return number_text(estimate.high - estimate.low, scale)


def advice_grid(options: Sequence[Option]) -> Grid:
    """A row for each option."""
    header = ("method", "scheme", "size", "tokens/s", "seeds", "difference (points)", "judgement")
    rows = (
        (
            one.method, one.scheme, size(one.packed_bytes),
            "" if one.tokens_per_second is None else f"{one.tokens_per_second:.1f} ({one.backend})",
            str(one.pooled.seeds), one.difference, one.judgement,
        )
        for one in options
    )  # fmt: skip
    return Grid(header, tuple(rows))


def advice_rows(options: Sequence[Option], memory: float | None) -> list[dict[str, Any]]:
    """The options as JSON data; ``chosen`` marks the one to use."""
    chosen = choose(options, memory)
    names = ("method", "scheme", "backend", "packed_bytes", "tokens_per_second", "judgement")
    return [
        {name: getattr(one, name) for name in names}
        | {"seeds": one.pooled.seeds, "documents": one.pooled.documents, "task": one.pooled.task}
        | {"difference": one.pooled.difference.value, "interval": _finite(one.pooled.difference)}
        | {"chosen": one is chosen}
        for one in options
    ]


def _finite(estimate: Estimate) -> list[float] | None:
    return None if math.isnan(estimate.error) else [estimate.low, estimate.high]


def advice_notes(options: Sequence[Option]) -> Iterator[str]:
    """What a reader of the table must know."""
    yield (
        "Size: the packed model, everything counted. The key-value cache, images and temporaries come on top of it: "
        "leave a fifth of the memory free for a request at a time, more for batches."
    )
    yield "Difference: score minus that of full precision on the same documents, with its 95 % interval."
    if any(one.pooled.seeds == 1 and one.pooled.drawn for one in options):
        yield "One seed: another draw of calibration samples can change the difference; three tell more."
    if any(one.tokens_per_second is None for one in options):
        yield "Tokens/s are shown of packed runs alone: backend=reference simulates low bits at full size."
