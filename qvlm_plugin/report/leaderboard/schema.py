"""The parts of a results file that a leaderboard reads. Whatever else is there is left alone."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from qvlm_plugin.errors import QVLMError


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="ignore", populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )


class DocumentCounts(_Part):
    """How many documents a task has, and how many of them were evaluated."""

    original: int
    effective: int


class DataOrigin(_Part):
    """Where a task's documents came from."""

    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    content_hash: str | None = None
    stand_in: bool = False

    @property
    def identity(self) -> str | None:
        """A commit or a content hash; None where neither is known."""
        return self.revision or self.content_hash


class CalibrationFacts(_Part):
    """What was calibrated on, and how many of these documents were evaluated."""

    source: str | None = None
    seed: int | None = None
    documents_compared: int | None = None
    documents_also_evaluated: int = 0


class Provenance(_Part):
    """What a run of this package tells about itself."""

    method: str
    scheme: str
    options: dict[str, Any] = Field(default_factory=dict)
    bits: dict[str, dict[str, float]] = Field(default_factory=dict)
    plan_hash: str | None = None
    table_hash: str | None = None
    model_fingerprint: str | None = None
    backend: str | None = None
    calibration: CalibrationFacts | None = None
    search_seconds: float | None = None
    pretrained: str | None = None
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    prompt_format: str | None = None
    system_prompt: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    commit: str | None = None
    data: dict[str, DataOrigin] = Field(default_factory=dict)
    stand_in: bool = False
    answers: dict[str, dict[str, int]] = Field(default_factory=dict)
    weight_bytes: int | None = None
    packed_bytes: int | None = None
    peak_memory_bytes: int | None = None
    seal: str | None = None

    @property
    def simulated(self) -> bool:
        """Whether weights were rounded and not packed: the run's memory and speed are then not those of its bits."""
        return self.method != "none" and self.backend == "reference"

    @property
    def measured_bytes(self) -> dict[str, int | None]:
        """``weight_bytes`` and ``peak_memory_bytes``; null where they are not those of the run's bits."""
        names = ("weight_bytes", "peak_memory_bytes")
        return {name: None if self.simulated else getattr(self, name) for name in names}


class Command(_Part):
    """How the harness was called."""

    model: str | None = None
    model_args: Any = None
    limit: float | None = None
    offset: int | None = None


def _with_choices(config: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(config.get("lmms_eval_specific_kwargs") or {}, dict):
        raise ValueError("lmms_eval_specific_kwargs is not an object")
    return config


class ResultsFile(_Part):
    """A results file of lmms-eval, with provenance if this package's model wrote it."""

    results: dict[str, dict[str, Any]]
    counts: dict[str, DocumentCounts] = Field(alias="n-samples")
    configs: dict[str, Annotated[dict[str, Any], AfterValidator(_with_choices)]] = Field(default_factory=dict)
    versions: dict[str, Any] = Field(default_factory=dict)
    higher_is_better: dict[str, dict[str, bool | None] | None] = Field(default_factory=dict)
    throughput: dict[str, Any] | None = None
    config: Command = Field(default_factory=Command)
    date: str | None = None
    model_name: str | None = None
    system_instruction: str | None = None
    qvlm: Provenance | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens by the time that generating them took; None where low bits are simulated."""
        speed = (self.throughput or {}).get("avg_speed")
        known = isinstance(speed, int | float) and 0 < speed < math.inf
        return speed if known and not (self.qvlm and self.qvlm.simulated) else None


def parse_results(content: Any, file: Path) -> ResultsFile:
    """Validate a results file's JSON.

    Raises:
        QVLMError: it does not have the shape of one, or its evaluation failed.
    """
    try:
        parsed = ResultsFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise QVLMError(f"{file} is not a results file of lmms-eval: {where}: {first['msg'].lower()}") from error
    if not parsed.results:
        raise QVLMError(f"{file} holds no results: the evaluation failed")
    return parsed


def numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """A task's scores with the names of their metrics and filters."""
    for key, value in metrics.items():
        metric, _, kind = key.partition(",")
        if kind and "_stderr" not in metric and isinstance(value, int | float) and not isinstance(value, bool):
            yield metric, kind, value


def main_metric(parsed: ResultsFile, task: str) -> str | None:
    """The first of a task's metrics, in its own order, that has a score."""
    scored = [metric for metric, _, value in numbers(parsed.results.get(task, {})) if math.isfinite(value)]
    return next((metric for metric in metric_list(parsed, task) if metric in scored), next(iter(scored), None))


def metric_list(parsed: ResultsFile, task: str) -> dict[str, dict[str, Any]]:
    """A task's metrics by name, in its own order."""
    listed = parsed.configs.get(task, {}).get("metric_list")
    entries = listed if isinstance(listed, list) else []
    return {str(entry.get("metric")): entry for entry in entries if isinstance(entry, dict)}
