"""Run a stack of blocks one by one on cached hidden states, so that a search needs one block at a time.

The cached states are on the device of the decoder's input. If weights are offloaded, or memory has run out
(`Footprint`), they are on the CPU instead (13B, 64 samples of 700 tokens: 0.5 GB for each copy, and a search keeps
about ten), and move to the device a few rows at a time.

`block_inputs` records what the model does between its blocks: the masks and positions that it passes to each block, and
what it adds to a block's hidden states (the visual features of DeepStack).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qvlm_plugin.conversation import to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.observe import watching
from qvlm_plugin.methods.options import MiningOptions
from qvlm_plugin.methods.replacements import (
    Replacements,
    changed_values,
    other_forward,
    quantized_modules,
    replaced,
)
from qvlm_plugin.methods.shard import Shard
from qvlm_plugin.models.placement import execution_device, is_offloaded, materialized
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.topology import ORDER, Blocks, Site, chains_of


@dataclass(frozen=True, eq=False)
class Batch:
    """The inputs of blocks for one calibration batch, in addition to the hidden states.

    Attributes:
        arguments: keyword arguments of each block (attention mask, rotary embeddings, …), by its full name.
        added: tensors added to the hidden states before a block reads them, by its full name; few blocks have one.
        attended: bool [B, T], false at padding.
        text: bool [B, T], true at positions that are neither padding nor part of an image.
        answer: bool [B, T], true where the model's output predicts a token of the answer.
    """

    arguments: Mapping[str, Mapping[str, Any]]
    added: Mapping[str, Tensor]
    attended: Tensor
    text: Tensor
    answer: Tensor

    def rows(self, start: int, stop: int) -> "Batch":
        """The samples from ``start`` to ``stop``."""
        whole = range(len(self.attended))[start:stop] == range(len(self.attended))
        return (
            self if whole else Batch(*(rows_of(part, start, stop, len(self.attended)) for part in vars(self).values()))
        )

    def read_by(self, name: str, states: Tensor, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """The arguments of the named block, on a device: the hidden states, and keyword arguments."""
        states = states.to(device)
        if name in self.added:
            states = states + self.added[name].to(device)
        return states, send_to_device(dict(self.arguments[name]), device)


def rows_of(arguments: Any, start: int, stop: int, count: int) -> Any:
    """A layer's arguments for some of ``count`` samples: these rows of tensors [count, …, …], all else unchanged."""

    def cut(value: Any) -> Any:
        each = isinstance(value, Tensor) and value.dim() > 1 and len(value) == count
        return value[start:stop] if each else value

    return tree_map(cut, arguments)


def predicting(answer: Tensor) -> Tensor:
    """Bool [B, T], true where the model's output predicts a token of the ``answer``, bool [B, T]."""
    predicts = torch.zeros_like(answer)
    predicts[:, :-1] = answer[:, 1:]
    return predicts


TOKENS: dict[str, Callable[[Batch], Tensor]] = {
    "all": lambda batch: batch.attended,
    "text": lambda batch: batch.text,
    "answer": lambda batch: batch.answer,
}
"""The tokens that an error is summed over: bool [B, T] of a batch. ``all`` is the paper's choice."""


@dataclass(frozen=True, eq=False)
class HiddenCache:
    """The hidden states of the calibration set between two layers.

    Attributes:
        states: [B, T, C] for each batch.
        batches: the blocks' other inputs for each batch.
        rows: samples that go through a layer together, see `Footprint`.
        shard: this process's shard; the batches are those of this process.
        first: index of its first batch among those of all processes.
        part: the part that the layers belong to.
    """

    states: Sequence[Tensor]
    batches: Sequence[Batch]
    rows: int | None = None
    shard: Shard = field(default_factory=Shard)
    first: int = 0
    part: str = "decoder"

    @property
    def device(self) -> torch.device:
        """The device of the states; the CPU for a process without batches."""
        return self.states[0].device if self.states else torch.device("cpu")

    def batch(self, index: int) -> "HiddenCache":
        """A cache of one batch."""
        return self.subset([index])

    def subset(self, chosen: Sequence[int]) -> "HiddenCache":
        """A cache of the chosen batches, given by their indices in this one."""
        return replace(self, states=[self.states[i] for i in chosen], batches=[self.batches[i] for i in chosen])

    def spread(self, share: float) -> list[int]:
        """Indices of this process's batches in an evenly spread ``share`` of all processes' batches, with the first."""
        numbers = range(self.first, self.first + len(self.states))
        return [n - self.first for n in numbers if n == 0 or int(n * share) > int((n - 1) * share)]

    def pieces(self) -> Iterator["HiddenCache"]:
        """The samples in order, at most ``rows`` at a time."""
        for states, batch in zip(self.states, self.batches, strict=True):
            step = self._step(states)
            for start in range(0, len(states), step):
                yield HiddenCache([states[start : start + step]], [batch.rows(start, start + step)])

    def joined(self, pieces: Sequence["HiddenCache"]) -> "HiddenCache":
        """The whole cache again, with the states of its `pieces`."""
        waiting = iter(pieces)
        states = []
        for before in self.states:
            parts = [next(waiting).states[0] for _ in range(0, len(before), self._step(before))]
            states.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        return replace(self, states=states)

    def _step(self, states: Tensor) -> int:
        """Rows of a batch that go through a layer together; all for states [N, C], whose rows are not samples."""
        return self.rows if self.rows and states.dim() > 2 else len(states)

    @torch.no_grad()
    def through(self, name: str, layer: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> "HiddenCache":
        """The outputs of ``layer`` for the states; ``parameters`` replace its own of the same names.

        The layer's weights may be offloaded; the outputs are on the device of the states.

        Raises:
            QVLMError: an output is not finite; the message has the layer's ``name``.
        """
        device, outputs = execution_device(layer), []
        with materialized(layer):
            for piece in self.pieces():
                (states,), (batch,) = piece.states, piece.batches
                read, arguments = batch.read_by(name, states, device)
                output = torch.func.functional_call(layer, dict(parameters or {}), (read,), arguments)
                output = output[0] if isinstance(output, tuple) else output
                _require_finite(output, batch.attended, f"the output of {name}")
                outputs.append(replace(piece, states=[output.to(states.device)]))
        return self.joined(outputs)

    @torch.no_grad()
    def inputs(self, name: str, layer: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
        """The inputs of ``sites`` of a layer, batch by batch: tokens [N, C] without padding, on the layer's device.

        The layer runs up to the last of the sites. Experts that process no token of a batch are left out.

        Args:
            name: the layer's full name.
            layer: the layer, which runs in its current state.
            sites: sites in the layer.
        """
        device = execution_device(layer)
        for index in range(len(self.states)):
            found: dict[Site, list[Tensor]] = {}
            waiting: set[str] = set()

            def look(
                site: Site,
                x: Tensor,
                mask: Tensor,
                found: dict[Site, list[Tensor]] = found,
                waiting: set[str] = waiting,
            ) -> None:
                found.setdefault(site, []).append(x[mask])
                waiting.discard(site.name)
                if not waiting:
                    raise _Reached

            with materialized(layer):
                for piece in self.batch(index).pieces():
                    (states,), (batch,) = piece.states, piece.batches
                    waiting.update(site.name for site in sites)
                    with watching(layer, sites, batch.attended, look, f"{name}."), suppress(_Reached):
                        read, arguments = batch.read_by(name, states, device)
                        layer(read, **arguments)
            # The parts of a site are freed once they are joined, and nothing here keeps what the caller takes.
            yield {site: torch.cat(found.pop(site)) for site in list(found)}

    def tokens(self) -> Tensor:
        """The states of all processes without padding: [N, C]."""
        pairs = zip(self.states, self.batches, strict=True)
        tokens = [states[batch.attended.to(states.device)] for states, batch in pairs]
        return torch.cat(self.shard.gathered(tokens)).to(self.device)

    def error(self, target: "HiddenCache", options: MiningOptions, weights: Sequence[Tensor] | None = None) -> float:
        """Squared distance from full-precision states (Eq. 3), summed over the tokens that the options select.

        The sum is over the batches of all processes, in their order.

        Args:
            target: the same states in full precision.
            options: ``tokens`` selects the tokens; ``relative_error`` divides each token's squared distance by its
                target's squared norm, so that the few tokens with massive activations do not dominate the sum.
            weights: factors of the tokens' squared distances, [B, T] for every batch of this process.
        """
        distances = []
        for index, (output, wanted, batch) in enumerate(zip(self.states, target.states, self.batches, strict=True)):
            mask = TOKENS[options.tokens](batch).to(output.device)
            distance = (output.float() - wanted.float()).square().sum(dim=-1)[mask]
            if options.relative_error:
                distance = distance / wanted.float().square().sum(dim=-1)[mask]
            if weights is not None:
                distance = distance * weights[index].to(mask.device)[mask]
            distances.append(float(distance.sum(dtype=torch.float64)))
        return sum(self.shard.gathered(distances))


class _Reached(Exception):
    """Ends a forward pass when it has reached a module."""


@torch.no_grad()
def block_inputs(context: SearchContext, part: str = "decoder", blocks: Blocks | None = None) -> HiddenCache:
    """The input of a part's first block in the model's current state, and the other inputs of all its blocks.

    For the visual parts, batches without an image are left out; their inputs have no padding, and their first dimension
    counts images instead of samples.

    Args:
        context: the search.
        part: the part.
        blocks: one of the part's chains (`topology.chains_of`), if it has several; None for its only one.

    Raises:
        QVLMError: the input is not finite.
    """
    model, blocks = context.model, context.blocks(part) if blocks is None else blocks
    on_cpu = context.footprint.caches_on_cpu or any(is_offloaded(block) for _, block in blocks)
    hidden: list[Tensor] = []
    batches: list[Batch] = []
    for inputs, answer in context.batches("hidden states"):
        attended = inputs["attention_mask"].bool()
        text, predicts = attended & (inputs["input_ids"] != model.config.image_token_id), predicting(answer)
        if part != "decoder" and torch.equal(text, attended):
            continue
        given = _block_arguments(model, to_device(inputs, context.device, model.dtype), blocks)
        states, _ = given[blocks[0][0]]
        masks = (attended, text, predicts)
        if part != "decoder":
            masks = (torch.ones(states.shape[:-1], dtype=torch.bool),) * 3
        _require_finite(states, masks[0], f"the input of {blocks[0][0]}")
        added = {name: seen for name, (seen, _) in given.items() if name != blocks[0][0] and seen.any()}
        others = {name: arguments for name, (_, arguments) in given.items()}, added
        hidden.append(states.to("cpu" if on_cpu else states.device, copy=True))
        batches.append(Batch(*(_on_cpu(others) if on_cpu else others), *masks))
    return HiddenCache(hidden, batches, context.footprint.rows, context.shard, context.share.start, part)


_BlockArguments = dict[str, tuple[Tensor, dict[str, Any]]]
"""The hidden states and the other arguments of each block's call, by its full name."""


def _block_arguments(model: nn.Module, inputs: Mapping[str, Tensor], blocks: Blocks) -> _BlockArguments:
    """The arguments of each block of a chain; the hidden states of all but the first are what the model adds to them.

    Only the first block runs, to learn the structure of a block's output; every block then returns zeros of this
    structure, so that a later block's hidden states are just what the model added before it.
    """
    given: _BlockArguments = {}
    form: list[Any] = []

    def noting(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = [*inspect.signature(forward).parameters]

        def note(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(names, args, strict=False)) | kwargs
            given[blocks[index][0]] = arguments.pop(names[0]), arguments
            if index == len(blocks) - 1:
                raise _Reached
            if not form:
                form.append(forward(*args, **kwargs))
            return tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, form[0])

        return note

    with suppress(_Reached), other_forward([block for _, block in blocks], noting):
        model(**inputs, use_cache=False)
    return given


def _on_cpu(values: Any) -> Any:
    """Nested tensors on the CPU; a tensor that several blocks share is copied once."""
    copies: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        return copies.setdefault(id(value), value.cpu()) if isinstance(value, Tensor) else value

    return tree_map(copied, values)


def quantized_inputs(
    context: SearchContext, plan: RoundingPlan, part: str = "decoder", blocks: Blocks | None = None
) -> HiddenCache:
    """`block_inputs` with the parts below quantized by the plan, and the values that it changes outside of blocks."""
    model, topology = context.model, context.topology
    lower_paths = [path for lower in ORDER[: ORDER.index(part)] for path in topology.paths(lower)]
    others = quantized_modules(plan, model, REFERENCE, lower_paths) if lower_paths else Replacements()
    in_blocks = [name for chain in chains_of(topology, model, part) for name, _ in chain]
    own = changed_values(plan, model, topology.paths(part), in_blocks)  # such as a norm in front of the first block
    with replaced(model, Replacements(others.linears, {**others.values, **own})):
        return block_inputs(context, part, blocks)


def _require_finite(states: Tensor, attended: Tensor, what: str) -> None:
    # Padding may have any value, since no other token attends to it. A projector that merges patches writes fewer
    # tokens than it reads, and none of them is padding.
    if attended.shape == states.shape[:-1]:
        states = states[attended.to(states.device)]
    if not states.isfinite().all():
        raise QVLMError(f"{what} is not finite on calibration data; try dtype=float32")
