"""The topology of a model, from runs of it without its weights.

Prompts with and without images show which modules are the tower, the projector and the decoder (`parts`), which Linears
read the same tensor (`runs`), and where scales can be folded (`producers`).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import combinations
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel, ProcessorMixin

from qvlm_plugin import plugins
from qvlm_plugin.conversation import Conversation, encode, to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.loading import Checkpoint, open_checkpoint
from qvlm_plugin.reading import parsed_elsewhere
from qvlm_plugin.topology import Group, Stack, Topology, blocks_of, require_only_linears
from qvlm_plugin.tracing.blocks import RecordedModel, inspect_block
from qvlm_plugin.tracing.parts import block_lists, find_parts, members
from qvlm_plugin.tracing.producers import producers
from qvlm_plugin.tracing.runs import Call, record_run
from qvlm_plugin.tracing.skeleton import Build, skeleton

TOPOLOGIES = ("described", "traced")
"""Allowed values of ``topology=``."""


def open_with_topology(pretrained: str, topology: str = "described", **opening: Any) -> Checkpoint:
    """Open a checkpoint whose parts are known; see `plugins.topology_of`.

    Args:
        pretrained, opening: see `open_checkpoint`.
        topology: ``described`` by a plugin, or ``traced``.

    Raises:
        QVLMError: see `open_checkpoint`; no plugin describes the family, or it cannot be traced.
    """
    check_topology(topology)
    plugins.plugin_manager()  # imports other packages, which may register models with transformers
    if topology == "traced":
        return traced(open_checkpoint(pretrained, **opening))
    return open_checkpoint(pretrained, check_config=plugins.topology, **opening)


def check_topology(topology: str) -> None:
    """Raise a QVLMError unless ``topology`` is one of `TOPOLOGIES`."""
    if topology not in TOPOLOGIES:
        raise QVLMError(f"topology={topology!r} is not known; allowed are {', '.join(TOPOLOGIES)}")


def traced(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the topology that `trace` finds."""
    return replace(checkpoint, topology=trace(checkpoint))


def trace(checkpoint: Checkpoint) -> Topology:
    """The topology of a checkpoint's model; its weights are not read.

    Raises:
        QVLMError: the model does not run, or its computation cannot be described.
    """
    build = partial(
        AutoModelForImageTextToText.from_config,
        dtype=torch.float32,
        trust_remote_code=checkpoint.trust_remote_code,
    )
    return _traced(checkpoint.config, checkpoint.processor, build, checkpoint.source)


def trace_model(model: PreTrainedModel, processor: ProcessorMixin) -> Topology:
    """The topology of a model in memory; the model itself is not run.

    Raises:
        QVLMError: see `trace`.
    """
    return _traced(model.config, processor, type(model), "the model")


def _traced(config: PretrainedConfig, processor: ProcessorMixin, build: Build, source: str) -> Topology:
    with parsed_elsewhere(f"{source}: the model cannot be traced"):
        return _trace(skeleton(config, build, len(processor.tokenizer)), _batches(processor), source)


def _trace(model: PreTrainedModel, batches: Sequence[dict[str, Any]], source: str) -> Topology:
    """The topology of a skeleton, from prompts of which the first has an image and the last has none."""
    blocks = [name for path in block_lists(model) for name in members(model, path)]
    for name in blocks:
        require_only_linears(name, model.get_submodule(name))
    runs = [record_run(model, inputs, blocks) for inputs in batches]
    parts = find_parts(model, runs[0], runs[-1], batches[0], source)
    chains = {
        "vision": members(model, parts.tower)[: parts.depth],
        "projector": [name for path in parts.projectors for name in members(model, path)],
        "decoder": members(model, parts.decoder),
    }
    alike = {_structure(model, name): name for names in chains.values() for name in reversed(names)}
    calls = record_run(model, batches[0], blocks, alike.values()).calls
    one_call = {_structure(model, name): (name, call) for name, call in calls.items()}
    written_by = cache(lambda structure: _producers(recorded, *one_call[structure]) if structure in one_call else {})
    recorded = RecordedModel(model, tuple(runs), source)
    found = {
        part: _stack(recorded, {name: written_by(_structure(model, name)) for name in names})
        for part, names in chains.items()
    }
    topology = Topology(
        vision_path=parts.vision_path,
        vision=replace(found["vision"], blocks=parts.tower.removeprefix(f"{parts.vision_path}.")),
        projector_path=parts.projectors[0] if len(parts.projectors) == 1 else parts.projectors,
        projector=found["projector"],
        decoder_path=parts.decoder.rpartition(".")[0],
        decoder=replace(found["decoder"], blocks=parts.decoder.rpartition(".")[2]),
    )
    if len(blocks_of(topology, model, "vision")) != parts.depth:  # not given by vision_feature_layer
        return replace(topology, vision=replace(topology.vision, depth=parts.depth))
    return topology


def _batches(processor: ProcessorMixin) -> list[dict[str, Any]]:
    """A prompt with an image, one with two of other shapes, and one without."""
    image = Image.linear_gradient("L").convert("RGB")
    prompts = [
        Conversation.from_prompt("What is shown?", [image.resize((96, 64))]),
        Conversation.from_prompt("Which of the two?", [image.resize((64, 80)), image.resize((120, 48))]),
        Conversation.from_prompt("What?"),
    ]
    cpu = torch.device("cpu")
    return [to_device(encode(processor, [prompt])[0], cpu, torch.float32) for prompt in prompts]


def _structure(model: nn.Module, name: str) -> str:
    """A text that is equal for blocks with the same structure."""
    return repr(model.get_submodule(name))


Producers = dict[tuple[str, ...], str]
"""The producers of a block's groups, for groups that have one."""


def _producers(recorded: RecordedModel, name: str, call: Call) -> Producers:
    """The producers of a block, from its call in the first run."""
    block, first = inspect_block(recorded, name), recorded.runs[0]
    called = sorted(
        (producer for producer in first.order if producer.startswith(f"{name}.")), key=first.order.__getitem__
    )
    order = [producer.removeprefix(f"{name}.") for producer in called]
    sites = {group: linears for group, linears in block.sites.items() if linears[0] in order}
    found = producers(recorded.model.get_submodule(name), call, list(sites.values()), order)
    written_by = {
        group: producer and block.of_any_expert(producer) for group, producer in zip(sites, found, strict=True)
    }
    # All experts and the router read the same tensor, some experts perhaps in other runs only.
    return {
        group: producer for group, producer in written_by.items() if producer and ("*" in producer) == ("*" in group[0])
    }


def _stack(recorded: RecordedModel, blocks: dict[str, Producers]) -> Stack:
    """The groups and kept Linears of blocks, given by their full names; the path of the blocks is left empty."""
    groups: dict[tuple[str, ...], set[str | None]] = {}
    kept: dict[str, None] = {}
    for name, written_by in blocks.items():
        block = inspect_block(recorded, name)
        kept |= dict.fromkeys(block.kept)
        for group in block.sites:
            groups.setdefault(group, set()).add(written_by.get(group))
    for group, other in combinations(groups, 2):
        if shared := set(group) & set(other):
            raise QVLMError(
                f"{recorded.source}: {min(shared)} shares its input with different Linears in different "
                f"blocks ({', '.join(group)}; {', '.join(other)}); such a model is not supported"
            )
    # A scale is folded only if this is possible in every block. Experts come last.
    described = [Group(group, one.pop() if len(one) == 1 else None) for group, one in groups.items()]
    return Stack("", tuple(sorted(described, key=lambda group: "*" in group.linears[0])), tuple(kept))
