"""The weight files of a checkpoint folder, and their tensors.

Files are mapped into memory instead of being read. Pickled code in a file is never run.
"""

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import inside, one_line, read_json

SAFETENSORS = ("model.safetensors",)
SAFETENSORS_OR_BIN = ("model.safetensors", "pytorch_model.bin")


def weight_files(folder: Path, names: Sequence[str], source: str) -> list[Path]:
    """The files of the first format that the folder contains; every shard that an index names must exist.

    Args:
        folder: the checkpoint's folder.
        names: the formats, each given by its name for a single file.
        source: the argument that names the folder, for messages.

    Raises:
        QVLMError: there are none, or a shard is missing.
    """
    for name in names:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = _shards(index, source)
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise QVLMError(f"{source}: missing {', '.join(missing)}, which {index.name} names")
            return shards
        if (folder / name).is_file():
            return [folder / name]
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    kinds = "safetensors files only" if names == SAFETENSORS else f"{' or '.join(names)}, whole or in shards"
    raise QVLMError(
        f"{source}: missing {names[0]}; weights are read from {kinds}; found {', '.join(found) or 'no weight file'}"
    )


def _shards(index: Path, source: str) -> list[Path]:
    try:
        names = set(read_json(index)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise QVLMError(f"{source}: {index.name} is not an index of weight files: {one_line(error)}") from error
    return sorted(inside(index.parent, name, f"{source}: {index.name}") for name in names)


def read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of all files, mapped into memory.

    Raises:
        QVLMError: a file is damaged, or contains pickled code.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_safetensors(file) if file.suffix == ".safetensors" else _read_bin(file)
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise QVLMError(f"{file}: the weights do not load: {one_line(error)}") from error


def _read_bin(file: Path) -> dict[str, Tensor]:
    try:
        # Files from before torch 1.6 are not zip archives and cannot be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise QVLMError(
            f"{file}: contains pickled code or is damaged; supported are files of tensors only, which torch.load reads "
            "with weights_only=True"
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise QVLMError(f"{file}: the weights do not load: {one_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise QVLMError(f"{file}: contains no state dict; supported are files that map names to tensors")
    return content
