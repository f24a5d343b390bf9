"""Where the parts of a vision-language model are: vision blocks, projector, decoder layers, and their Linear layers.

A family of models is described by data: attribute paths and groups of Linear layers. `resolve` turns a description into
the quantization *sites* of one model. A site is an activation quantizer; Linears that read the same tensor (q, k, v;
gate, up) share one. `qvlm_plugin.families` describes the families that come with the package.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from qvlm_plugin.errors import QVLMError


@dataclass(frozen=True)
class Group:
    """Linears that read the same tensor.

    In a group of experts, ``*`` stands for the expert's index, and each expert is a group of its own. The model must
    call each expert as ``expert(tokens, rows)``, with the tokens [N, C] of the whole batch and the rows routed to it.

    Attributes:
        linears: names relative to the block.
        producer: the norm or Linear whose output channels the group reads, into which per-channel scales can be folded;
            None if an activation function or attention comes between them.
    """

    linears: tuple[str, ...]
    producer: str | None = None


@dataclass(frozen=True)
class Stack:
    """A list of blocks.

    Attributes:
        blocks: path of the ModuleList, relative to the part; empty if the part itself is the only block.
        groups: the Linears of the blocks, in the order of the computation. A block may lack a group.
        kept: Linears that stay in the compute type whatever the scheme says (routers, a unit matrix).
        depth: for the tower, the number of blocks, from the bottom, that the output depends on; None: as many as the
            configuration's ``vision_feature_layer`` needs, or all if it has none.
    """

    blocks: str
    groups: tuple[Group, ...]
    kept: tuple[str, ...] = ()
    depth: int | None = None


@dataclass(frozen=True)
class Topology:
    """A family of vision-language models.

    Attributes:
        vision_path, projector_path, decoder_path: attribute paths of the parts, from the top of the model. A model with
            several projectors, each of which reads its own features, has a tuple of paths; the path of a ModuleList
            stands for all of its members.
        vision, projector, decoder: the blocks of each part; several projectors have the same structure.
    """

    vision_path: str
    vision: Stack
    projector_path: str | tuple[str, ...]
    projector: Stack
    decoder_path: str
    decoder: Stack

    def paths(self, part: str) -> tuple[str, ...]:
        """The attribute paths of a part: one, or those of several projectors."""
        path = getattr(self, f"{part}_path")
        return (path,) if isinstance(path, str) else path


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

ORDER = ("vision", "projector", "decoder")
"""The parts in the order of the computation."""


@dataclass(frozen=True)
class Site:
    """One activation quantizer of one model.

    Attributes:
        name: the full name of its first Linear.
        part: ``vision``, ``projector`` or ``decoder``.
        block: index of the block in its part.
        linears: full names of the Linears that read its input.
        producer: full name of the module that writes its input; None if no scales can be folded into it.
        expert: full name of the expert that it belongs to, which sees only some of the tokens; None outside experts.
    """

    name: str
    part: str
    block: int
    linears: tuple[str, ...]
    producer: str | None
    expert: str | None = None


def resolve(topology: Topology, model: PreTrainedModel) -> tuple[Site, ...]:
    """The quantization sites of ``model``, from the image to the answer.

    Vision blocks above the deepest feature layer that the projector reads do not affect the output and have no site.

    Raises:
        QVLMError: the model lacks a described module, or a block has a Linear that the topology does not name, or
            weights that are not Linears.
    """
    return tuple(site for part in ORDER for site in _sites(topology, model, part))


def kept_linears(topology: Topology, model: PreTrainedModel) -> frozenset[str]:
    """Full names of the Linears that the topology leaves in the compute type although the output depends on them."""
    return frozenset(
        f"{path}.{name}"
        for part in ORDER
        for path, block in blocks_of(topology, model, part)
        for name in linear_layers(block).keys() & set(getattr(topology, part).kept)
    )


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every Linear of the model by its full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


Blocks = list[tuple[str, nn.Module]]
"""Blocks with their full names."""


def blocks_of(topology: Topology, model: PreTrainedModel, part: str) -> Blocks:
    """The blocks of a part that have sites, with their full names, bottom to top."""
    return [block for chain in chains_of(topology, model, part) for block in chain]


def chains_of(topology: Topology, model: PreTrainedModel, part: str) -> list[Blocks]:
    """`blocks_of` by chains, in which each block reads the output of the one before: the stack, or each projector."""
    stack = getattr(topology, part)
    chains = [chain for path in topology.paths(part) for chain in _chains(model, path, stack)]
    if part != "vision":
        return chains
    return [chain[: stack.depth or _used_vision_blocks(model.config, len(chain))] for chain in chains]


def _used_vision_blocks(config: PretrainedConfig, depth: int) -> int:
    """The number of vision blocks, from the bottom, that the selected features need (hidden state 0: the embedding)."""
    layers = getattr(config, "vision_feature_layer", -1)
    layers = [layers] if isinstance(layers, int) else layers
    return max(layer if layer >= 0 else depth + 1 + layer for layer in layers)


def _chains(model: nn.Module, part_path: str, stack: Stack) -> list[Blocks]:
    path = f"{part_path}.{stack.blocks}" if stack.blocks else part_path
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise QVLMError(f"the topology names {path!r}, which {type(model).__name__} does not have") from error
    if not isinstance(module, nn.ModuleList):
        return [[(path, module)]]
    members = [(f"{path}.{index}", block) for index, block in enumerate(module)]
    return [members] if stack.blocks else [[member] for member in members]


def require_only_linears(path: str, block: nn.Module) -> None:
    """Check that a block has no weights of other kinds that are multiplied: experts in one Parameter.

    Raises:
        QVLMError: the block, named by ``path``, has such weights.
    """
    for name, parameter in block.named_parameters():
        owner = block.get_submodule(name.rpartition(".")[0])
        if parameter.dim() > 2 and not isinstance(owner, _CONVOLUTIONS):
            raise QVLMError(
                f"{path}: {name} is a Parameter of shape {tuple(parameter.shape)}, not a Linear: models whose experts "
                "are kept together in one Parameter cannot be quantized"
            )


def _sites(topology: Topology, model: PreTrainedModel, part: str) -> Iterator[Site]:
    stack = getattr(topology, part)
    for index, (path, block) in enumerate(blocks_of(topology, model, part)):
        require_only_linears(path, block)
        linears = linear_layers(block)
        undescribed = linears.keys() - set(stack.kept)
        for group in stack.groups:
            for expert in _members(group, linears):
                own = _of_expert(group, expert)
                if absent := set(own.linears) - linears.keys():
                    raise QVLMError(f"{path}: the topology and the model differ in their Linear layers: {min(absent)}")
                undescribed -= set(own.linears)
                names = tuple(f"{path}.{name}" for name in own.linears)
                producer = f"{path}.{own.producer}" if own.producer else None
                owner = f"{path}.{group.linears[0].partition('*')[0]}{expert}" if expert else None
                yield Site(names[0], part, index, names, producer, owner)
        if undescribed:
            odd = ", ".join(sorted(undescribed))
            raise QVLMError(f"{path}: the topology and the model differ in their Linear layers: {odd}")


def _members(group: Group, linears: Mapping[str, nn.Linear]) -> list[str]:
    """The indices of a block's experts that have the group's Linears; [""] for a group outside experts; empty if the
    block has none of the group's Linears."""
    if "*" not in group.linears[0]:
        return [""] if linears.keys() & set(group.linears) else []
    before, _, after = group.linears[0].partition("*")
    names = [name for name in linears if name.startswith(before) and name.endswith(after)]
    return [name.removeprefix(before).removesuffix(after) for name in names]


def _of_expert(group: Group, expert: str) -> Group:
    return Group(
        tuple(name.replace("*", expert) for name in group.linears),
        group.producer and group.producer.replace("*", expert),
    )
