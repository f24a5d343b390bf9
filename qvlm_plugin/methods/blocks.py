"""Run a decoder layer by layer on cached hidden states, so that a search needs one block of it at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.conversation import to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.topology import Topology, decoder_layers

Hidden = list[Tensor]
"""Hidden states of the calibration set, a tensor [B, T, C] for each batch."""


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


class _FirstLayerReached(Exception):
    """Ends a forward pass whose only purpose was to reach the decoder."""


@torch.no_grad()
def decoder_inputs(
    loaded: LoadedModel, topology: Topology, calibration: CalibrationSet, batch_size: int
) -> tuple[Hidden, list[Batch]]:
    """The input of the first decoder layer for every batch, and what goes with it."""
    hidden: Hidden = []
    batches: list[Batch] = []
    _, first = decoder_layers(topology, loaded.model)[0]

    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs.pop("hidden_states")
        hidden.append(states.clone())
        arguments.update(kwargs)
        raise _FirstLayerReached

    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for inputs, answer in calibration.batches(loaded.processor, batch_size):
            arguments: dict[str, Any] = {}
            attended = inputs["attention_mask"].bool()
            with suppress(_FirstLayerReached):
                loaded.model(**to_device(inputs, loaded.model.device, loaded.model.dtype), use_cache=False)
            text = attended & (inputs["input_ids"] != loaded.model.config.image_token_id)
            predicts = torch.zeros_like(answer)
            predicts[:, :-1] = answer[:, 1:]
            batches.append(Batch(arguments, attended, text, predicts))
    finally:
        handle.remove()
    return hidden, batches


@torch.no_grad()
def run_layer(
    layer: nn.Module, hidden: Hidden, batches: Sequence[Batch], parameters: Mapping[str, Tensor] | None = None
) -> Hidden:
    """Outputs of ``layer`` on every batch, with ``parameters`` in place of its own of the same names."""
    device = next(layer.parameters()).device
    outputs = []
    for states, batch in zip(hidden, batches, strict=True):
        arguments = send_to_device(dict(batch.arguments), device)
        output = torch.func.functional_call(layer, dict(parameters or {}), (states.to(device),), arguments)
        outputs.append((output[0] if isinstance(output, tuple) else output).to(states.device))
    return outputs


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> Iterator[None]:
    """While active, ``model`` has other modules and parameter values at the given names."""
    originals = {name: model.get_submodule(name) for name in modules}
    kept = {name: model.get_parameter(name).detach().clone() for name in values}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        with torch.no_grad():
            for name, value in values.items():
                model.get_parameter(name).copy_(value)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
        with torch.no_grad():
            for name, value in kept.items():
                model.get_parameter(name).copy_(value)


TOKENS: dict[str, Callable[[Batch], Tensor]] = {
    "all": lambda batch: batch.attended,
    "text": lambda batch: batch.text,
    "answer": lambda batch: batch.answer,
}
"""Which tokens an error counts: bool [B, T] of a batch. ``all`` is the paper's."""


def output_error(
    outputs: Hidden, targets: Hidden, batches: Sequence[Batch], tokens: str = "all", relative: bool = False
) -> float:
    """Squared distance between quantized and full-precision outputs (Eq. 3), summed over the counted tokens.

    Args:
        outputs, targets: hidden states [B, T, C] of every batch.
        batches: for the masks.
        tokens: a key of `TOKENS`.
        relative: divide each token's squared distance by its target's squared norm, so that the few tokens with massive
            activations do not decide alone.

    Raises:
        QVLMError: the outputs are not finite.
    """
    total = torch.zeros((), dtype=torch.float64)
    for output, target, batch in zip(outputs, targets, batches, strict=True):
        mask = TOKENS[tokens](batch).to(output.device)
        distance = (output.float() - target.float()).square().sum(dim=-1)[mask]
        if relative:
            distance = distance / target.float().square().sum(dim=-1)[mask]
        total += distance.sum(dtype=torch.float64).cpu()
    if not total.isfinite():
        raise QVLMError("a decoder layer's output is not finite on calibration data; try dtype=float32")
    return float(total)
