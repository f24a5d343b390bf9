"""What tells runs apart in a table."""

from collections import Counter
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

Facts = Mapping[str, Any]
"""A run's ``qvlm`` provenance; empty for models of other packages."""

_NONE = "–"


def traits(runs: Mapping[Path, Facts]) -> dict[Path, dict[str, str]]:
    """Of each run, by its results file, what tells it from the others beside method and scheme.

    That is the model, the arithmetic (``backend``) and the seed of the calibration draw, each where runs that have one
    differ in it, and the folder where some would still look the same. The model is named, too, where one is of another
    package, which has no method. All runs have the same keys.
    """
    known = {file: _traits(file, facts) for file, facts in runs.items()}
    models = {own["model"] for own in known.values()}
    if len({Path(model).name for model in models}) == len(models):
        known = {file: own | {"model": Path(own["model"]).name} for file, own in known.items()}
    told = {name: {own[name] for own in known.values()} - {_NONE} for name in ("model", "backend", "seed")}
    names = [name for name, values in told.items() if len(values) > 1 or (name == "model" and not all(runs.values()))]
    found = {file: {name: own[name] for name in names} for file, own in known.items()}
    looks = {file: _look(runs[file], own) for file, own in found.items()}
    alike = Counter(looks.values())
    if len(alike) < len(runs):
        for file, folder in _folders(list(runs)).items():
            found[file]["folder"] = folder if alike[looks[file]] > 1 else _NONE
    return found


def labels(runs: Mapping[Path, Facts]) -> dict[Path, str]:
    """The runs' names: method and scheme, or of other packages the model, and in brackets their `traits`."""
    return {file: _label(runs[file], file, own) for file, own in traits(runs).items()}


def _label(facts: Facts, file: Path, own: Mapping[str, str]) -> str:
    name = f"{facts.get('method', '?')} {facts.get('scheme', '?')}" if facts else file.parent.name
    differing = [value for value in own.values() if value != _NONE]
    return f"{name} ({', '.join(differing)})" if differing else name


def _traits(file: Path, facts: Facts) -> dict[str, str]:
    calibration = facts.get("calibration") or {}
    return {
        "model": str(facts.get("pretrained") or file.parent.name),
        "backend": str(facts.get("backend", _NONE)) if facts.get("method") != "none" else _NONE,
        "seed": str(calibration.get("seed", _NONE)),
    }


def _look(facts: Facts, own: Mapping[str, str]) -> tuple[str, ...]:
    return str(facts.get("method")), str(facts.get("scheme")), *own.values()


def _folders(files: list[Path]) -> dict[Path, str]:
    """Of their folders the part in which they differ; of results files in the same folder also the file's name."""
    paths = {file: file.resolve().parent.parts for file in files}
    start = _alike(list(paths.values()))
    end = _alike([parts[start:][::-1] for parts in paths.values()])
    folders = {file: "/".join(parts[start : len(parts) - end]) or "." for file, parts in paths.items()}
    twins = Counter(folders.values())
    return {file: name if twins[name] == 1 else f"{name}/{file.name}" for file, name in folders.items()}


def _alike(paths: list[tuple[str, ...]]) -> int:
    """How many parts all begin with."""
    return sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False)))
