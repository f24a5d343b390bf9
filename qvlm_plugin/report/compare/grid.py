"""The grid: models × methods × schemes × tasks, from a YAML file or from flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import one_line
from qvlm_plugin.report.runs import Cell

FULL_PRECISION = ("none", "w16a16")
"""Method and scheme that every other one is compared with."""


class CompareGrid(BaseModel):
    """What is compared; the fields are the keys of the YAML file and the flags.

    Attributes:
        models: checkpoint folders or hub ids; ``demo`` is the embedded one.
        methods: quantization methods; full precision is run beside them.
        schemes: bit widths.
        tasks: lmms-eval's names.
        calibration: ``task:split:n`` or ``file.json:n``, joined by +.
        options: of methods, by method.
        model_args: further model arguments of every run.
        limit: documents of each task; None evaluates all.
        metric: what is compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    models: tuple[str, ...] = Field(min_length=1)
    methods: tuple[str, ...] = Field(min_length=1)
    schemes: tuple[str, ...] = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1)
    calibration: str = "scienceqa:train:64"
    options: dict[str, dict[str, str | int | float | bool]] = Field(default_factory=dict)
    model_args: dict[str, str | int | float | bool] = Field(default_factory=dict)
    limit: int | None = Field(None, ge=1)
    metric: str = "exact_match"

    @field_validator("models", "methods", "schemes", "tasks")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names) or not all(names):
            raise ValueError("each name must be there once, and none empty")
        return names


def read_grid(file: Path | None, flags: Mapping[str, Any]) -> CompareGrid:
    """The grid of a YAML file, in which flags take the place of its values.

    Args:
        file: None for a grid from flags alone.
        flags: fields of `CompareGrid`; those that are None are not given.

    Raises:
        QVLMError: the file is not readable, or a value is missing or not allowed.
    """
    content: Any = {}
    if file is not None:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise QVLMError(f"{file} is not a YAML file: {one_line(error)}") from error
        if not isinstance(content, dict):
            raise QVLMError(f"{file} must hold keys and values; allowed keys are {', '.join(CompareGrid.model_fields)}")
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return CompareGrid.model_validate({**content, **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        why = {"missing": "is missing", "extra_forbidden": "is no key"}.get(first["type"], first["msg"].lower())
        allowed = ", ".join(CompareGrid.model_fields)
        raise QVLMError(f"{file or 'the grid'}: {name}: {why}; allowed are {allowed}") from error


def cells(grid: CompareGrid) -> list[Cell]:
    """One cell for each model, method, scheme and task; of full precision one for each model and task.

    Cells of one plan follow each other, so that one searches it and the others find it.
    """
    combinations = [FULL_PRECISION]
    combinations += [(method, scheme) for method in grid.methods if method != "none" for scheme in grid.schemes]
    found = []
    for number, model in enumerate(grid.models):
        for method, scheme in combinations:
            arguments: dict[str, Any] = {"pretrained": model, "method": method, "scheme": scheme}
            if method != "none":
                arguments |= {"calibration": grid.calibration, **grid.options.get(method, {})}
            arguments |= grid.model_args
            texts = {
                name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in arguments.items()
            }
            for task in grid.tasks:
                folder = "-".join((Path(model).name or "model", *((str(number),) if number else ())))
                name = f"{folder}/{method}-{scheme}/{task}".replace(":", ".")
                found.append(Cell(name, texts, (task,), grid.limit))
    return found
