"""Finished steps of a search, kept on disk so that an interrupted search can resume."""

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
    """A folder of finished steps, each an atomically written safetensors file.

    Attributes:
        folder: folder of one search only, named by a hash of all that determines the search. None: keep nothing.
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
        """The outcome of a stored step; None if it is missing or damaged."""
        file = self.folder and self.folder / f"{step}.safetensors"
        if not file or not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as content:
                data = parse_json(content.metadata()["data"])
            return data, load_file(file)
        except (SafetensorError, KeyError, TypeError, ValueError):  # damaged: the step is done again
            return None

    def discard(self) -> None:
        """Remove the folder, after the search's outcome was stored elsewhere."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
