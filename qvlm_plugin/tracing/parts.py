"""Find the parts of a model: the tower, the decoder, and the projectors between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.topology import linear_layers
from qvlm_plugin.tracing.blocks import BY_HAND
from qvlm_plugin.tracing.runs import Run, affects


@dataclass(frozen=True)
class Parts:
    """Full names of the parts.

    Attributes:
        tower, decoder: the ModuleLists of their blocks.
        vision_path: full name of the tower's module.
        depth: how many of the tower's blocks, from the bottom, the output depends on.
        projectors: modules between the two, in the order of their definition; a ModuleList stands for its members.
    """

    tower: str
    decoder: str
    vision_path: str
    depth: int
    projectors: tuple[str, ...]


def block_lists(model: nn.Module) -> list[str]:
    """Full names of the ModuleLists whose members have Linears; only the outermost of nested ones."""
    found: list[str] = []
    for name, module in model.named_modules():
        nested = any(within(name, other) for other in found)
        if isinstance(module, nn.ModuleList) and not nested and linear_layers(module):
            found.append(name)
    return found


def within(name: str, path: str) -> bool:
    """Whether a module is the one at ``path``, or inside it."""
    return name == path or name.startswith(f"{path}.")


def members(model: nn.Module, path: str) -> list[str]:
    """Full names of a ModuleList's members; for any other module, its own name."""
    module = model.get_submodule(path)
    return [f"{path}.{index}" for index in range(len(module))] if isinstance(module, nn.ModuleList) else [path]


def find_parts(model: nn.Module, image_run: Run, text_run: Run, inputs: Mapping[str, Any], source: str) -> Parts:
    """The parts of a model.

    Args:
        model: see `skeleton`.
        image_run, text_run: runs with an image and without.
        inputs: inputs of the run with an image.
        source: the model's name in messages.

    Raises:
        QVLMError: it has no list of blocks for images, or none for text.
    """
    lists = block_lists(model)
    texts = [path for path in lists if _begin(path, text_run) is not None]
    images = [path for path in lists if _begin(path, image_run) is not None and path not in texts]
    decoder = max(texts, key=lambda path: len(linear_layers(model.get_submodule(path))), default=None)
    tower = min(images, key=lambda path: _begin(path, image_run), default=None)  # resamplers come after it
    if decoder is None or tower is None:
        missing, way = ("decoder layers", "text") if decoder is None else ("vision blocks", "an image")
        raise QVLMError(
            f"{source}: found no list of {missing} with Linear layers that processes {way}; models of this kind "
            "cannot be quantized (docs/add-a-family.md)"
        )
    matters = affects(model, inputs)
    blocks = members(model, tower)
    depth = len(blocks)
    while depth and not matters([model.get_submodule(blocks[depth - 1])]):
        depth -= 1
    if not depth:
        raise QVLMError(f"{source}: the model's output does not depend on the output of {tower}; {BY_HAND}")
    begin = _begin(tower, image_run)
    between = dict.fromkeys(
        _owner(name, (tower, decoder))
        for name, module in model.named_modules()
        if image_run.order.get(name, 0) > begin and name not in text_run.order and _has_weights(module)
        and not within(name, tower) and not within(name, decoder)
    )  # fmt: skip
    vision_path = _vision_path(tower, decoder)
    used = [path for path in between if matters(map(model.get_submodule, members(model, path)))]
    for path in used:
        if isinstance(model.get_submodule(path), nn.Linear):
            raise QVLMError(
                f"{source}: the projector {path} is itself a Linear, not a module with Linears; such a model is not "
                "supported"
            )
    multiplying = [path for path in used if linear_layers(model.get_submodule(path))]
    # A projector without a Linear (Gemma 3's) is distinguished from the tower's norms by its path.
    projectors = multiplying or [path for path in used if not within(path, vision_path)]
    return Parts(tower, decoder, vision_path, depth, tuple(projectors))


def _begin(path: str, run: Run) -> int | None:
    """The rank of the first call of a module in the list; None if none was called."""
    return min((rank for name, rank in run.order.items() if within(name, path)), default=None)


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _owner(name: str, lists: tuple[str, str]) -> str:
    """The outermost module around ``name`` that contains neither of the two lists."""
    steps = name.split(".")
    paths = [".".join(steps[:length]) for length in range(1, len(steps) + 1)]
    return next(path for path in paths if not any(within(path_of_list, path) for path_of_list in lists))


def _vision_path(tower: str, decoder: str) -> str:
    """The outermost module around the tower's list that does not contain the decoder's list."""
    steps, others = tower.split("."), decoder.split(".")
    shared = next(index for index, pair in enumerate(zip(steps, others, strict=False)) if pair[0] != pair[1])
    return ".".join(steps[: min(shared + 1, len(steps) - 1)])
