"""What an interrupted search has found so far, kept on disk for the next attempt."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from qvlm_plugin.atomic import write_file
from qvlm_plugin.reading import parse_json


@dataclass(frozen=True)
class Workspace:
    """A folder of finished steps; each is one safetensors file, written in one go.

    Attributes:
        folder: where; it must belong to one search alone, so its name should hold what decides that search. None keeps
            nothing.
    """

    folder: Path | None = None

    def keep(self, step: str, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Store a step's outcome: JSON data, and tensors by name."""
        if self.folder is None:
            return
        blob = save(
            {name: tensor.cpu().contiguous() for name, tensor in (tensors or {}).items()}, {"data": json.dumps(data)}
        )
        write_file(self.folder / f"{step}.safetensors", blob)

    def recall(self, step: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The outcome of a step that was stored whole, else None."""
        file = self.folder and self.folder / f"{step}.safetensors"
        if not file or not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as content:
                data = parse_json(content.metadata()["data"])
            return data, load_file(file)
        except (SafetensorError, KeyError, TypeError, ValueError):  # not one of ours: do the step again
            return None

    def discard(self) -> None:
        """Remove the folder, once the search's outcome is stored elsewhere."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
