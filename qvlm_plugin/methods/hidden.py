"""Run a stack of blocks one by one on cached hidden states, so that a search needs one block of it at a time.

The cached states lie where the decoder's input does, so that a model that fits on its devices is searched there. Where
weights are offloaded, or memory has run out (`Footprint`), they lie on the CPU (13B, 64 samples of 700 tokens: 0.5 GB
for each copy, and a search keeps about ten), and come to the device as few rows at a time as the footprint says.
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
from qvlm_plugin.methods.shard import Shard
from qvlm_plugin.methods.stand_ins import StandIns, replaced, stand_ins
from qvlm_plugin.models.placement import execution_device, is_offloaded, materialized
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.topology import ORDER, Site


@dataclass(frozen=True, eq=False)
class Batch:
    """What every decoder layer gets besides the hidden states of one calibration batch.

    Attributes:
        arguments: keyword arguments of the layer (attention mask, rotary embeddings, …).
        attended: bool [B, T], false at padding.
        text: bool [B, T], true at positions that are neither padding nor part of an image.
        answer: bool [B, T], true where the model's output predicts a token of the answer.
    """

    arguments: Mapping[str, Any]
    attended: Tensor
    text: Tensor
    answer: Tensor

    def rows(self, start: int, stop: int) -> "Batch":
        """The samples from ``start`` to ``stop``."""
        whole = range(len(self.attended))[start:stop] == range(len(self.attended))
        return (
            self if whole else Batch(*(rows_of(part, start, stop, len(self.attended)) for part in vars(self).values()))
        )


def rows_of(arguments: Any, start: int, stop: int, count: int) -> Any:
    """A layer's arguments for some of ``count`` samples: of tensors [count, …, …] these rows, all else as it is."""

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
"""Which tokens an error counts: bool [B, T] of a batch. ``all`` is the paper's."""


@dataclass(frozen=True, eq=False)
class HiddenCache:
    """The hidden states of the calibration set between two layers.

    Attributes:
        states: [B, T, C] for each batch.
        batches: what goes with them.
        rows: samples that go through a layer together, see `Footprint`.
        shard: of this process; the batches are its own.
        first: index of its first batch among those of all processes.
        part: whose blocks the states are between.
    """

    states: Sequence[Tensor]
    batches: Sequence[Batch]
    rows: int | None = None
    shard: Shard = field(default_factory=Shard)
    first: int = 0
    part: str = "decoder"

    def batch(self, index: int) -> "HiddenCache":
        """One batch alone."""
        return self.some([index])

    def some(self, chosen: Sequence[int]) -> "HiddenCache":
        """The chosen batches, by their indices here."""
        return replace(self, states=[self.states[i] for i in chosen], batches=[self.batches[i] for i in chosen])

    def spread(self, share: float) -> list[int]:
        """Indices here of a ``share`` of the batches of all processes, evenly spread, the first among them."""
        numbers = range(self.first, self.first + len(self.states))
        return [n - self.first for n in numbers if n == 0 or int(n * share) > int((n - 1) * share)]

    def pieces(self) -> Iterator["HiddenCache"]:
        """As few samples at a time as ``rows`` says, in their order."""
        for states, batch in zip(self.states, self.batches, strict=True):
            step = self.rows or len(states)
            for start in range(0, len(states), step):
                yield HiddenCache([states[start : start + step]], [batch.rows(start, start + step)])

    def joined(self, pieces: Sequence["HiddenCache"]) -> "HiddenCache":
        """What `pieces` has taken apart, with the states that the pieces have now."""
        waiting = iter(pieces)
        states = []
        for before in self.states:
            parts = [next(waiting).states[0] for _ in range(0, len(before), self.rows or len(before))]
            states.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        return replace(self, states=states)

    @torch.no_grad()
    def through(self, name: str, layer: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> "HiddenCache":
        """What ``layer`` makes of the states, with ``parameters`` in place of its own of the same names.

        The layer's weights need not be on a device, and the outputs lie where the states do.

        Raises:
            QVLMError: an output is not finite; the message has the layer's ``name``.
        """
        device, outputs = execution_device(layer), []
        with materialized(layer):
            for piece in self.pieces():
                (states,), (batch,) = piece.states, piece.batches
                arguments = send_to_device(dict(batch.arguments), device)
                output = torch.func.functional_call(layer, dict(parameters or {}), (states.to(device),), arguments)
                output = output[0] if isinstance(output, tuple) else output
                _require_finite(output, batch.attended, f"the output of {name}")
                outputs.append(replace(piece, states=[output.to(states.device)]))
        return self.joined(outputs)

    @torch.no_grad()
    def inputs(self, name: str, layer: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
        """What ``sites`` of a layer read, batch by batch: tokens [N, C] without padding, on the layer's device.

        The layer is run up to the last of its sites. Experts that serve no token of a batch are left out.

        Args:
            name: of the layer.
            layer: as it is to run.
            sites: in the layer.
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
                        layer(states.to(device), **send_to_device(dict(batch.arguments), device))
            yield {site: torch.cat(parts) for site, parts in found.items()}

    def tokens(self) -> Tensor:
        """The states of all processes without padding: [N, C]."""
        pairs = zip(self.states, self.batches, strict=True)
        tokens = [states[batch.attended.to(states.device)] for states, batch in pairs]
        return torch.cat(self.shard.gathered(tokens)).to(tokens[0].device)

    def error(self, target: "HiddenCache", options: MiningOptions, weights: Sequence[Tensor] | None = None) -> float:
        """Squared distance from full-precision states (Eq. 3), summed over the tokens that the options count.

        It is that of all processes, summed in the order of the batches.

        Args:
            target: the same states in full precision.
            options: ``tokens`` says which tokens count; ``relative_error`` divides each token's squared distance by its
                target's squared norm, so that the few tokens with massive activations do not decide alone.
            weights: multiply each token's squared distance by these, [B, T] for every batch of this process.
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
    """Ends a forward pass whose only purpose was to reach a module."""


@torch.no_grad()
def block_inputs(context: SearchContext, part: str = "decoder") -> HiddenCache:
    """The input of the first block of a part, in the model as it is now.

    Batches without an image show the visual parts nothing and are left out there. What these read has no padding, and
    an image is what a sample is to the decoder.

    Raises:
        QVLMError: it is not finite.
    """
    model, path = context.model, getattr(context.topology, f"{part}_path")
    on_cpu = context.footprint.caches_on_cpu or is_offloaded(model.get_submodule(path))
    hidden: list[Tensor] = []
    batches: list[Batch] = []
    name, first = context.blocks(part)[0]

    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        names = [*inspect.signature(module.forward).parameters]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        states = arguments.pop(names[0])
        masks = (attended, text, predicts)
        if part != "decoder":
            masks = (torch.ones(states.shape[:-1], dtype=torch.bool),) * 3
        _require_finite(states, masks[0], f"the input of {name}")
        hidden.append(states.to("cpu" if on_cpu else states.device, copy=True))
        batches.append(Batch(send_to_device(arguments, "cpu") if on_cpu else arguments, *masks))
        raise _Reached

    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for inputs, answer in context.batches("hidden states"):
            attended = inputs["attention_mask"].bool()
            text, predicts = attended & (inputs["input_ids"] != model.config.image_token_id), predicting(answer)
            if part == "decoder" or not torch.equal(text, attended):
                with suppress(_Reached):
                    model(**to_device(inputs, context.device, model.dtype), use_cache=False)
    finally:
        handle.remove()
    return HiddenCache(hidden, batches, context.footprint.rows, context.shard, context.share.start, part)


def quantized_inputs(context: SearchContext, plan: RoundingPlan, part: str = "decoder") -> HiddenCache:
    """`block_inputs` above the parts below as the plan makes them."""
    below = [getattr(context.topology, f"{lower}_path") for lower in ORDER[: ORDER.index(part)]]
    with replaced(context.model, stand_ins(plan, context.model, REFERENCE, below) if below else StandIns()):
        return block_inputs(context, part)


def _require_finite(states: Tensor, attended: Tensor, what: str) -> None:
    # Padding may hold anything: no token that counts attends to it.
    if not states[attended.to(states.device)].isfinite().all():
        raise QVLMError(f"{what} is not finite on calibration data; try dtype=float32")
