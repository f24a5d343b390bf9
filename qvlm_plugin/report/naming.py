"""Names that distinguish runs in a table."""

from collections import Counter
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

Facts = Mapping[str, Any]
"""A run's ``qvlm`` provenance; empty for models of other packages."""

_NONE = "–"


def traits(runs: Mapping[Path, Facts]) -> dict[Path, dict[str, str]]:
    """What distinguishes each run from the others in addition to method and scheme, by results file.

    These are the model, the arithmetic (``backend``) and the seed of the calibration draw, each if runs differ in it,
    and the folder if runs would still look the same. The model is also named if any run is of another package, which
    has no method. All runs have the same keys.
    """
    known = {file: _traits(file, facts) for file, facts in runs.items()}
    models = {own["model"] for own in known.values()}
    if len({Path(model).name for model in models}) == len(models):
        known = {file: own | {"model": Path(own["model"]).name} for file, own in known.items()}
    values = {name: {own[name] for own in known.values()} - {_NONE} for name in ("model", "backend", "seed")}
    names = [name for name, own in values.items() if len(own) > 1 or (name == "model" and not all(runs.values()))]
    found = {file: {name: own[name] for name in names} for file, own in known.items()}
    shown = {file: _shown(runs[file], own) for file, own in found.items()}
    counts = Counter(shown.values())
    if len(counts) < len(runs):
        for file, folder in _folders(list(runs)).items():
            found[file]["folder"] = folder if counts[shown[file]] > 1 else _NONE
    return found


def labels(runs: Mapping[Path, Facts]) -> dict[Path, str]:
    """The runs' names: method and scheme (for other packages, the model) with their `traits` in brackets."""
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


def _shown(facts: Facts, own: Mapping[str, str]) -> tuple[str, ...]:
    return str(facts.get("method")), str(facts.get("scheme")), *own.values()


def _folders(files: list[Path]) -> dict[Path, str]:
    """The part of each file's folder that differs between files, with the file's name if files share a folder."""
    paths = {file: file.resolve().parent.parts for file in files}
    start = _common_length(list(paths.values()))
    end = _common_length([parts[start:][::-1] for parts in paths.values()])
    folders = {file: "/".join(parts[start : len(parts) - end]) or "." for file, parts in paths.items()}
    counts = Counter(folders.values())
    return {file: name if counts[name] == 1 else f"{name}/{file.name}" for file, name in folders.items()}


def _common_length(paths: list[tuple[str, ...]]) -> int:
    """Number of leading parts that all paths share."""
    return sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False)))
