"""Where the parts of a vision-language model are: vision blocks, projector, decoder layers, and their Linear layers.

A family of models is described by data: attribute paths and groups of Linear layers. `resolve` turns a description into
the quantization *sites* of one model. A site is a place where activations are quantized; Linears that read the same
tensor (q, k, v; gate, up) share one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from qvlm_plugin.errors import QVLMError


@dataclass(frozen=True)
class Group:
    """Linears that read the same tensor.

    Attributes:
        linears: names relative to the block.
        producer: the norm or Linear whose output channels the group reads, so that per-channel scales can be folded
            into it; None where an activation function or attention mixes in between.
    """

    linears: tuple[str, ...]
    producer: str | None = None


@dataclass(frozen=True)
class Stack:
    """A list of alike blocks.

    Attributes:
        blocks: path of the ModuleList, relative to the part; empty when the part is itself the one block.
        groups: the Linears of one block, in the order of the computation.
    """

    blocks: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Topology:
    """A family of vision-language models.

    Attributes:
        vision_path, projector_path, decoder_path: attribute paths of the parts, from the top of the model.
        vision, projector, decoder: what the parts are made of.
    """

    vision_path: str
    vision: Stack
    projector_path: str
    projector: Stack
    decoder_path: str
    decoder: Stack


@dataclass(frozen=True)
class Site:
    """One activation quantizer of one model.

    Attributes:
        name: the full name of its first Linear.
        part: ``vision``, ``projector`` or ``decoder``.
        block: index of the block in its part.
        linears: full names of the Linears that read it.
        producer: full name of the module that writes it, when scales can be folded there.
    """

    name: str
    part: str
    block: int
    linears: tuple[str, ...]
    producer: str | None


_CLIP_BLOCK = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), producer="layer_norm1"),
    Group(("self_attn.out_proj",), producer="self_attn.v_proj"),
    Group(("mlp.fc1",), producer="layer_norm2"),
    Group(("mlp.fc2",)),
)

_DINOV2_BLOCK = (
    Group(("attention.q_proj", "attention.k_proj", "attention.v_proj"), producer="norm1"),
    Group(("attention.o_proj",), producer="attention.v_proj"),
    Group(("mlp.fc1",), producer="norm2"),
    Group(("mlp.fc2",)),
)

_LLAMA_BLOCK = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), producer="input_layernorm"),
    Group(("self_attn.o_proj",), producer="self_attn.v_proj"),
    Group(("mlp.gate_proj", "mlp.up_proj"), producer="post_attention_layernorm"),
    Group(("mlp.down_proj",), producer="mlp.up_proj"),
)

VISION_TOWERS = {
    "clip_vision_model": Stack("encoder.layers", _CLIP_BLOCK),
    "siglip_vision_model": Stack("encoder.layers", _CLIP_BLOCK),
    "dinov2": Stack("encoder.layer", _DINOV2_BLOCK),
}
"""Vision towers by ``config.vision_config.model_type``."""

DECODERS = {name: Stack("layers", _LLAMA_BLOCK) for name in ("llama", "mistral", "qwen2")}
"""Language models by ``config.text_config.model_type``."""


def llava_topology(config: PretrainedConfig) -> Topology | None:
    """The topology of Hugging Face ``llava`` models; None for other families.

    Raises:
        QVLMError: the tower or the language model of a llava model is not one of those described here.
    """
    if config.model_type != "llava":
        return None
    tower, decoder = config.vision_config.model_type, config.text_config.model_type
    if tower not in VISION_TOWERS or decoder not in DECODERS:
        raise QVLMError(
            f"llava model with vision tower {tower!r} and language model {decoder!r}: known towers are "
            f"{', '.join(VISION_TOWERS)}; known language models are {', '.join(DECODERS)}"
        )
    return Topology(
        vision_path="model.vision_tower",
        vision=VISION_TOWERS[tower],
        projector_path="model.multi_modal_projector",
        projector=Stack("", (Group(("linear_1",)), Group(("linear_2",)))),
        decoder_path="model.language_model",
        decoder=DECODERS[decoder],
    )


def resolve(topology: Topology, model: PreTrainedModel) -> tuple[Site, ...]:
    """The quantization sites of ``model``, from the image to the answer.

    Vision blocks above the deepest feature layer that the projector reads do not affect the output and have no site.

    Raises:
        QVLMError: a described module is not in the model, or a block holds a Linear that the topology does not name.
    """
    used = _used_vision_blocks(model.config, len(_blocks(model, topology.vision_path, topology.vision)))
    return (
        *_sites(model, "vision", topology.vision_path, topology.vision, used),
        *_sites(model, "projector", topology.projector_path, topology.projector),
        *_sites(model, "decoder", topology.decoder_path, topology.decoder),
    )


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every Linear of the model by its full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def decoder_layers(topology: Topology, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder layers with their full names, bottom to top."""
    return list(_blocks(model, topology.decoder_path, topology.decoder))


def _used_vision_blocks(config: PretrainedConfig, depth: int) -> int:
    """How many vision blocks, from the bottom, the selected features depend on (hidden state 0 is the embedding)."""
    layers = getattr(config, "vision_feature_layer", -1)
    layers = [layers] if isinstance(layers, int) else layers
    return max(layer if layer >= 0 else depth + 1 + layer for layer in layers)


def _blocks(model: nn.Module, part_path: str, stack: Stack) -> list[tuple[str, nn.Module]]:
    path = f"{part_path}.{stack.blocks}" if stack.blocks else part_path
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise QVLMError(f"the topology names {path!r}, which {type(model).__name__} does not have") from error
    return [(f"{path}.{index}", block) for index, block in enumerate(module)] if stack.blocks else [(path, module)]


def _sites(model: nn.Module, part: str, part_path: str, stack: Stack, used_blocks: int | None = None) -> Iterator[Site]:
    for index, (path, block) in enumerate(_blocks(model, part_path, stack)[:used_blocks]):
        described = [name for group in stack.groups for name in group.linears]
        present = list(linear_layers(block))
        if set(described) != set(present):
            odd = ", ".join(sorted(set(described) ^ set(present)))
            raise QVLMError(f"{path}: the topology and the model differ in their Linear layers: {odd}")
        for group in stack.groups:
            linears = tuple(f"{path}.{name}" for name in group.linears)
            producer = f"{path}.{group.producer}" if group.producer else None
            yield Site(linears[0], part, index, linears, producer)
