"""The parts of a results file that the leaderboard reads; other parts are ignored."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import parse_json

SUFFIX = "_results.json"
"""End of the names of results files."""


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="ignore", populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )


class DocumentCounts(_Part):
    """Number of documents of a task, and of those evaluated."""

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
        """A commit or a content hash; None if neither is known."""
        return self.revision or self.content_hash


class CalibrationFacts(_Part):
    """The source of the calibration samples, and how many of them were also evaluated."""

    source: str | None = None
    seed: int | None = None
    documents_compared: int | None = None
    documents_also_evaluated: int = 0


class Provenance(_Part):
    """What a run of this package records about itself."""

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
        """Whether low bits are simulated: the run's memory and speed are then not those of its bits."""
        return is_simulated(self.method, self.backend)

    @property
    def measured_bytes(self) -> dict[str, int | None]:
        """``weight_bytes`` and ``peak_memory_bytes``; None if low bits are simulated."""
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
        """Generated tokens per second of generation; None if unknown, or if low bits are simulated."""
        return None if self.qvlm and self.qvlm.simulated else generation_speed(self.throughput)


def is_simulated(method: str | None, backend: str | None) -> bool:
    """Whether weights were rounded but not packed."""
    return method != "none" and backend == "reference"


def generation_speed(throughput: Mapping[str, Any] | None) -> float | None:
    """Generated tokens per second in a results file's ``throughput``; None if it has none."""
    speed = (throughput or {}).get("avg_speed")
    return speed if isinstance(speed, int | float) and 0 < speed < math.inf else None


def samples_prefix(results: Path) -> str:
    """How the names of the samples files begin that belong to a results file; the task's name follows."""
    return f"{results.name.removesuffix(SUFFIX)}_samples_"


def samples_file(results: Path, task: str) -> Path:
    """The path of a task's samples file that belongs to a results file."""
    return results.with_name(f"{samples_prefix(results)}{task}.jsonl")


def find_results_files(paths: Sequence[Path]) -> list[Path]:
    """The results files given, and all those below the folders given, each once.

    Raises:
        QVLMError: a path does not exist, or a folder has no results file (lmms-eval exits with 0 even when an
            evaluation failed).
    """
    found = {}
    for path in paths:
        if not path.exists():
            raise QVLMError(f"{path} does not exist; name results files of lmms-eval, or folders that contain some")
        files = sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not files:
            raise QVLMError(f"{path} contains no *{SUFFIX}: the evaluation failed, or wrote to another folder")
        found |= {file.resolve(): file for file in files}
    return [*found.values()]


def read_results_file(file: Path) -> tuple[bytes, Any, ResultsFile]:
    """The bytes of a results file, their JSON content, and the results.

    Raises:
        QVLMError: the file cannot be read, see also `parse_results`.
    """
    try:
        blob = file.read_bytes()
        content = parse_json(blob)
    except (OSError, ValueError) as error:
        raise QVLMError(f"{file} is not a results file of lmms-eval: {error}") from error
    return blob, content, parse_results(content, file)


def parse_results(content: Any, file: Path) -> ResultsFile:
    """Validate a results file's JSON.

    Raises:
        QVLMError: the content is not that of a results file, or the evaluation failed.
    """
    try:
        parsed = ResultsFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise QVLMError(f"{file} is not a results file of lmms-eval: {where}: {first['msg'].lower()}") from error
    if not parsed.results:
        raise QVLMError(f"{file} contains no results: the evaluation failed")
    return parsed


def numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """A task's scores as (metric, filter, value)."""
    for key, value in metrics.items():
        metric, _, kind = key.partition(",")
        if kind and "_stderr" not in metric and isinstance(value, int | float) and not isinstance(value, bool):
            yield metric, kind, value


def main_metric(parsed: ResultsFile, task: str) -> str | None:
    """The first metric of a task, in the task's order, that has a score."""
    scored = [metric for metric, _, value in numbers(parsed.results.get(task, {})) if math.isfinite(value)]
    return next((metric for metric in metric_list(parsed, task) if metric in scored), next(iter(scored), None))


def metric_list(parsed: ResultsFile, task: str) -> dict[str, dict[str, Any]]:
    """A task's metrics by name, in the task's order."""
    listed = parsed.configs.get(task, {}).get("metric_list")
    entries = listed if isinstance(listed, list) else []
    return {str(entry.get("metric")): entry for entry in entries if isinstance(entry, dict)}
