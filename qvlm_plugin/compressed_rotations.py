"""Rotations of inputs in the ``compressed-tensors`` format, as far as vLLM's transforms can express them.

The package's transform configuration has no Kronecker products: a transform is one square matrix that inputs are
multiplied by. A reader constructs it (``hadamard``: Sylvester's, of a power of two, without signs) or reads it from the
folder. A rotation R of K channels is stored as √K R, of kind ``random-hadamard``, which readers divide by √K: if R
consists of Hadamard matrices, entries are 1 and -1, exact in every type. It is stored once for all Linears of one
width, with the first of them, as the package does.

With it, vLLM computes K² multiplications for each token instead of K (outer + 64 + …). vLLM refuses biases of Linears
whose inputs it transforms, and runs transforms on one GPU only. It matches transforms with modules by its own names, in
which the decoder's layers are below ``language_model``, too.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme
from torch import nn

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.plan_header import ModulePlan, Rotation
from qvlm_plugin.rotation import factors, rotate

_DECODER = "language_model"


@dataclass(frozen=True)
class Rotations:
    """The transforms of a folder.

    Attributes:
        readers: the rotation of one of its sites, and the Linears whose inputs it rotates, by the matrix's name.
    """

    readers: Mapping[str, tuple[Rotation, list[str]]]

    @classmethod
    def of(cls, plan: RoundingPlan, model: nn.Module) -> "Rotations":
        """The rotations of a plan.

        Raises:
            QVLMError: a rotation cannot be expressed; the message names the Linear.
        """
        matrices: dict[tuple[int, int, int], tuple[Rotation, list[str]]] = {}
        for module in plan.quantized:
            if rotation := plan.rotation_of(module):
                if reason := _obstacle(module, rotation, model):
                    raise QVLMError(f"--format compressed-tensors cannot express {module.name}: {reason}")
                key = rotation.outer, rotation.block, rotation.seed
                matrices.setdefault(key, (rotation, []))[1].append(module.name)
        return cls({f"rotation_{outer}x{block}_{seed}": found for (outer, block, seed), found in matrices.items()})

    def store(self, model: nn.Module) -> None:
        """Add each matrix to its first reader, in the model's type."""
        for name, (rotation, readers) in self.readers.items():
            matrix = rotate(torch.eye(rotation.channels), factors(rotation)) * rotation.channels**0.5
            signs = matrix.sign()
            matrix = signs if torch.allclose(matrix, signs, atol=1e-3) else matrix
            weight = nn.Parameter(matrix.to(model.dtype), requires_grad=False)
            model.get_submodule(readers[0]).add_module(f"{name}_input", nn.ParameterDict({"weight": weight}))

    def configuration(self) -> dict[str, Any]:
        """The ``transform_config`` entry of the quantization's configuration; empty without rotations."""
        if not self.readers:
            return {}
        schemes = {
            name: TransformScheme(
                type="random-hadamard",
                apply=[TransformArgs(targets=[_pattern(reader) for reader in readers], location="input")],
            )
            for name, (_, readers) in self.readers.items()
        }
        config = TransformConfig(config_groups=schemes)
        return {"transform_config": config.model_dump(mode="json", exclude_unset=True)}


def _obstacle(module: ModulePlan, rotation: Rotation, model: nn.Module) -> str | None:
    if rotation.scaled:
        return (
            "its inputs are scaled before they are rotated, which would take a matrix for every site; "
            "search the plan with --option transform=rotate"
        )
    if module.part != "decoder" or _DECODER not in module.name.split("."):
        return (
            "its inputs are rotated, which vLLM can do in the decoder only; leave the other parts as they are, "
            "as in --scheme w4a8+vision:w16a16+projector:w16a16"
        )
    if model.get_submodule(module.name).bias is not None:
        return "its inputs are rotated and it has a bias, which vLLM refuses where it transforms inputs"
    return None


def _pattern(name: str) -> str:
    """A pattern that matches a decoder's Linear by its name in transformers and in vLLM."""
    within = name[name.index(f"{_DECODER}.") + len(_DECODER) + 1 :]
    return rf"re:.*{_DECODER}\.(.*\.)?{re.escape(within)}$"
