"""The grid: models × methods × schemes × seeds × tasks, from a YAML file or from flags."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.plan_request import PlanRequest, check_request
from qvlm_plugin.reading import one_line
from qvlm_plugin.report.cluster import JobRequest
from qvlm_plugin.report.runs import Cell

FULL_PRECISION = ("none", "w16a16")
"""Method and scheme of the runs that are not quantized."""

STORED = "stored"
"""Stands for the scheme of a row whose checkpoint was already quantized; its results record the real scheme."""

PREVIOUS = "previous"
"""The baseline of a ladder: each method is compared with the one before it, the first with full precision."""

GRIDS = Path(__file__).parent / "grids"
"""Folder of the grids that come with the package."""


class CompareGrid(BaseModel):
    """What to compare; the fields are the keys of the YAML file and the flags.

    Attributes:
        models: checkpoint folders or hub ids; ``demo`` is the embedded one.
        methods: quantization methods, or names of rows whose options name their ``method``; full precision always runs
            too.
        schemes: bit widths.
        tasks: lmms-eval's names.
        calibration: ``task:split:n`` or ``file.json:n``, joined by +.
        options: options by method or name of a row. ``pretrained`` names a checkpoint that is already quantized; it
            runs once, in its own scheme, and is compared with the model.
        model_args: further model arguments of every run.
        seeds: seeds of the calibration draw; methods that need no samples run once.
        baseline: method that the others are compared with, at the same scheme, task and seed; ``none`` is full
            precision, ``previous`` the previous method in the list.
        limit: documents of each task; None evaluates all.
        metric: metric to compare.
        cluster: resources of a run's job, if runs are jobs of a cluster.
        name: name of the report's files, without suffix.
        title: heading of the report; None names the baseline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    models: tuple[str, ...] = Field(min_length=1)
    methods: tuple[str, ...] = Field(min_length=1)
    schemes: tuple[str, ...] = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1)
    calibration: str = "scienceqa:train:64"
    options: dict[str, dict[str, str | int | float | bool]] = Field(default_factory=dict)
    model_args: dict[str, str | int | float | bool] = Field(default_factory=dict)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    baseline: str = "none"
    limit: int | None = Field(None, ge=1)
    metric: str = "exact_match"
    cluster: JobRequest = JobRequest()
    name: str = Field("comparison", pattern=r"^[\w-]+$")
    title: str | None = None

    @field_validator("models", "methods", "schemes", "tasks", "seeds")
    @classmethod
    def _each_once(cls, names: tuple[str | int, ...]) -> tuple[str | int, ...]:
        if len(set(names)) < len(names) or "" in names:
            raise ValueError("values must be unique and not empty")
        return names

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        allowed = ", ".join(self.methods)
        if self.baseline not in ("none", PREVIOUS, *self.methods):
            raise ValueError(
                f"baseline: {self.baseline} is not among the methods; allowed are none, {PREVIOUS}, {allowed}"
            )
        if unknown := self.options.keys() - set(self.methods):
            raise ValueError(f"options: {min(unknown)} is not among the methods; allowed are {allowed}")
        if "seed" in self.model_args:
            raise ValueError(f"model_args: give seed={self.model_args['seed']} in seeds instead")
        for name in filter(self.is_stored, self.methods):
            if self.options[name].get("method", "none") != "none":
                raise ValueError(f"options: {name} is already quantized (pretrained), so it takes no method")
            if len(self.models) > 1:
                raise ValueError(f"models: {name} is a checkpoint of one model (pretrained), so only one is allowed")
            against = self._baseline_name(name)
            if against not in ("none", name) and not self.is_stored(against) and len(self.schemes) > 1:
                raise ValueError(
                    f"baseline: {name} has its own scheme (pretrained), but {against} has {len(self.schemes)}; "
                    "allowed are baseline none, or one scheme"
                )
        return self

    def is_stored(self, method: str) -> bool:
        """Whether a row is a checkpoint that is already quantized."""
        return "pretrained" in self.options.get(method, {})

    def runs(self) -> list[tuple[str, str, int | None]]:
        """Method, scheme and seed of every run of a model on a task, full precision first.

        Raises:
            QVLMError: see `check_request`.
        """
        found: list[tuple[str, str, int | None]] = [(*FULL_PRECISION, None)]
        for method in self.methods:
            schemes = (STORED,) if self.is_stored(method) else () if method == "none" else self.schemes
            found += [(method, scheme, seed) for scheme in schemes for seed in self.draws(method, scheme)]
        return found

    def _baseline_name(self, method: str) -> str:
        if self.baseline != PREVIOUS:
            return self.baseline
        methods = ["none", *(name for name in self.methods if name != "none")]
        return methods[methods.index(method) - 1]

    def baseline_of(self, method: str, scheme: str) -> tuple[str, str] | None:
        """Method and scheme of the baseline of a method at this scheme; None for the baseline itself."""
        if method in ("none", self.baseline):
            return None
        named = self._baseline_name(method)
        if named == "none":
            return FULL_PRECISION
        if self.is_stored(named):
            return named, STORED
        return named, self.schemes[0] if scheme == STORED else scheme

    def draws(self, method: str, scheme: str) -> tuple[int | None, ...]:
        """The seeds of a method's runs; (None,) if it needs no samples, so that nothing is drawn.

        Raises:
            QVLMError: see `check_request`.
        """
        if self.is_stored(method):
            return (None,)
        return self.seeds if self.request(method, scheme).needs_calibration else (None,)

    def row(self, name: str) -> tuple[str, dict[str, str | int | float | bool]]:
        """The quantization method of a row, and its options."""
        options = dict(self.options.get(name, {}))
        return str(options.pop("method", name)), options

    def request(self, name: str, scheme: str) -> PlanRequest:
        """The request of a row at a scheme; that of full precision if its checkpoint is already quantized.

        Raises:
            QVLMError: see `check_request`.
        """
        if self.is_stored(name):
            return check_request(*FULL_PRECISION, {})
        method, options = self.row(name)
        known = check_request(method, scheme, {}).method.options.model_fields
        shared = {option: value for option, value in self.model_args.items() if option in known}
        return check_request(method, scheme, {**options, **shared})


def read_grid(file: Path | None, flags: Mapping[str, Any]) -> CompareGrid:
    """The grid of a YAML file, with values replaced by those of flags.

    Args:
        file: a file, or the name of one in `GRIDS`; None for a grid from flags alone.
        flags: values by field of `CompareGrid`; None means not given. Keys of ``cluster`` are replaced one by one.

    Raises:
        QVLMError: the file cannot be read, or a value is missing or not allowed.
    """
    content: Any = {}
    if file is not None:
        shipped = GRIDS / f"{file}.yaml"
        file = shipped if not file.is_file() and shipped in GRIDS.iterdir() else file
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise QVLMError(f"{file} is not a YAML file: {one_line(error)}") from error
        if not isinstance(content, dict):
            raise QVLMError(f"{file} must have keys and values; allowed keys are {', '.join(CompareGrid.model_fields)}")
    named = {name: value for name, value in flags.items() if value is not None}
    given = dict(named)
    if isinstance(content.get("cluster"), dict):
        given["cluster"] = content["cluster"] | given.get("cluster", {})
    try:
        return CompareGrid.model_validate({**content, **given})
    except ValidationError as error:
        raise QVLMError(_explain(error.errors()[0], file, named)) from error


def _explain(problem: Mapping[str, Any], file: Path | None, flags: Mapping[str, Any]) -> str:
    """The error message for a value, which names the flag or the file's key that gave it."""
    text = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"].lower()
    loc = tuple(map(str, problem["loc"] or (text.partition(":")[0],)))
    text = text.removeprefix(f"{loc[0]}: ")
    of_job = loc[0] == "cluster" and len(loc) > 1
    keys = ", ".join(JobRequest.model_fields if of_job else CompareGrid.model_fields)
    flag = loc[1] if of_job else loc[0]
    by_flag = file is None or flag in (flags.get("cluster") or {} if of_job else flags)
    name = f"--{flag.replace('_', '-')}" if by_flag else f"{file}: {'.'.join(loc)}"
    match problem["type"]:
        case "missing":
            return (
                f"{name} is missing; write it, or name a YAML file that lists it"
                if by_flag
                else f"{name}: is missing; allowed are {keys}"
            )
        case "extra_forbidden":
            return f"{name}: is not a key; allowed are {keys}"
        case "value_error":
            return f"{name}: {text}"
    return f"{name}: {text}, not {problem['input']!r}"


@dataclass(frozen=True)
class GridCell:
    """A run of the grid, with the values of the grid that it stands for.

    Attributes:
        model, method, scheme, task: the grid's values; the method of a named row is the row's name.
        seed: seed of the calibration draw; None without one.
        cell: the run.
    """

    model: str
    method: str
    scheme: str
    seed: int | None
    task: str
    cell: Cell


def cells(grid: CompareGrid) -> list[GridCell]:
    """The cells of a grid: one for each model, method, scheme, seed and task.

    Full precision and checkpoints that are already quantized have one cell for each model and task. Cells of the same
    plan follow each other, so that the first searches the plan and the others reuse it.

    Raises:
        QVLMError: a method, a scheme or an option is unknown or not allowed.
    """
    found = []
    for number, model in enumerate(grid.models):
        for method, scheme, seed in grid.runs():
            searched, options = grid.row(method)
            arguments: dict[str, Any] = {"pretrained": model, "method": searched, "scheme": scheme}
            if scheme == STORED:  # quantized by another program, or exported: it takes no method and no scheme
                arguments = options
            elif method != "none":
                arguments |= {"calibration": grid.calibration, **options}
            if seed:  # 0 is the model's default, so a run with seed=0 is the same as one without
                arguments |= {"seed": seed}
            arguments |= grid.model_args
            texts = {
                name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in arguments.items()
            }
            folder = "-".join((Path(model).name or "model", *((str(number),) if number else ())))
            named = method if scheme == STORED else f"{method}-{scheme}"
            run = re.sub(r"[^\w.+:-]+", "_", named) + (f"-seed{seed}" if seed else "")
            for task in grid.tasks:
                cell = Cell(f"{folder}/{run}/{task}".replace(":", "."), texts, (task,), grid.limit)
                found.append(GridCell(model, method, scheme, seed, task, cell))
    return found
