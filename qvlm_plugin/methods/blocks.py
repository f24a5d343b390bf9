"""Run a decoder layer by layer on cached hidden states, so that a search needs one block of it at a time.

The cached states lie where the decoder's input does, so that a model that fits on its devices is searched there. Where
weights are offloaded, memory on the device is what is short: the states lie on the CPU (13B, 64 samples of 700 tokens:
0.5 GB for each copy, and a search holds about ten), and one batch at a time goes to the device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.conversation import to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.models.placement import execution_device, is_offloaded, materialized, place_like
from qvlm_plugin.plan import quantized_linear
from qvlm_plugin.plan_header import ModulePlan, Rotation
from qvlm_plugin.topology import Topology, decoder_layers

Hidden = list[Tensor]
"""Hidden states of the calibration set, a tensor [B, T, C] for each batch."""

TokenWeights = list[list[Tensor]]
"""For each decoder layer and batch, how much each token of the layer's output matters: float32 [B, T]."""


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


def predicting(answer: Tensor) -> Tensor:
    """Bool [B, T], true where the model's output predicts a token of the ``answer``, bool [B, T]."""
    predicts = torch.zeros_like(answer)
    predicts[:, :-1] = answer[:, 1:]
    return predicts


class _FirstLayerReached(Exception):
    """Ends a forward pass whose only purpose was to reach the decoder."""


@torch.no_grad()
def decoder_inputs(
    loaded: LoadedModel, topology: Topology, calibration: CalibrationSet, batch_size: int
) -> tuple[Hidden, list[Batch]]:
    """The input of the first decoder layer for every batch, and what goes with it.

    Raises:
        QVLMError: it is not finite.
    """
    model = loaded.model
    device, on_cpu = execution_device(model), is_offloaded(model.get_submodule(topology.decoder_path))
    hidden: Hidden = []
    batches: list[Batch] = []
    name, first = decoder_layers(topology, model)[0]

    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs.pop("hidden_states")
        _require_finite(states, attended, f"the input of {name}")
        hidden.append(states.to("cpu" if on_cpu else states.device, copy=True))
        arguments.update(kwargs)
        raise _FirstLayerReached

    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for inputs, answer in calibration.batches(loaded.processor, batch_size):
            arguments: dict[str, Any] = {}
            attended = inputs["attention_mask"].bool()
            with suppress(_FirstLayerReached):
                model(**to_device(inputs, device, model.dtype), use_cache=False)
            text = attended & (inputs["input_ids"] != model.config.image_token_id)
            batches.append(Batch(arguments, attended, text, predicting(answer)))
    finally:
        handle.remove()
    return hidden, batches


@torch.no_grad()
def run_layer(
    name: str,
    layer: nn.Module,
    hidden: Hidden,
    batches: Sequence[Batch],
    parameters: Mapping[str, Tensor] | None = None,
) -> Hidden:
    """Outputs of ``layer`` on every batch, with ``parameters`` in place of its own of the same names.

    The layer's weights need not be on a device, and the outputs lie where ``hidden`` does.

    Raises:
        QVLMError: an output is not finite; the message has the layer's ``name``.
    """
    device = execution_device(layer)
    outputs = []
    with materialized(layer):
        for states, batch in zip(hidden, batches, strict=True):
            arguments = send_to_device(dict(batch.arguments), device)
            output = torch.func.functional_call(layer, dict(parameters or {}), (states.to(device),), arguments)
            output = output[0] if isinstance(output, tuple) else output
            _require_finite(output, batch.attended, f"the output of {name}")
            outputs.append(output.to(states.device))
    return outputs


def _require_finite(states: Tensor, attended: Tensor, what: str) -> None:
    # What attention makes of padding is nobody's concern.
    if not states[attended.to(states.device)].isfinite().all():
        raise QVLMError(f"{what} is not finite on calibration data; try dtype=float32")


def stand_in(
    module: ModulePlan,
    linear: nn.Linear,
    tensors: Mapping[str, Tensor],
    kernel: Kernel,
    rotation: Rotation | None = None,
) -> QuantLinear:
    """What ``linear`` becomes by its entry in a plan, in the same place: on its device, or offloaded like it."""
    with materialized(linear):
        layer = quantized_linear(module, linear, tensors, kernel, rotation)
    place_like(layer, linear)
    return layer


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> Iterator[None]:
    """While active, ``model`` has other modules and parameter values at the given names."""
    originals = {name: model.get_submodule(name) for name in modules}
    with ExitStack() as stack:
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in values):
            stack.enter_context(materialized(model.get_submodule(owner)))
        kept = {name: model.get_parameter(name).detach().clone() for name in values}
        try:
            _put(model, modules, values)
            yield
        finally:
            _put(model, originals, kept)


@torch.no_grad()
def _put(model: nn.Module, modules: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


TOKENS: dict[str, Callable[[Batch], Tensor]] = {
    "all": lambda batch: batch.attended,
    "text": lambda batch: batch.text,
    "answer": lambda batch: batch.answer,
}
"""Which tokens an error counts: bool [B, T] of a batch. ``all`` is the paper's."""


def output_error(
    outputs: Hidden,
    targets: Hidden,
    batches: Sequence[Batch],
    tokens: str = "all",
    relative: bool = False,
    weights: Sequence[Tensor] | None = None,
) -> float:
    """Squared distance between quantized and full-precision outputs (Eq. 3), summed over the counted tokens.

    Args:
        outputs, targets: hidden states [B, T, C] of every batch.
        batches: for the masks.
        tokens: a key of `TOKENS`.
        relative: divide each token's squared distance by its target's squared norm, so that the few tokens with massive
            activations do not decide alone.
        weights: multiply each token's squared distance by these, [B, T] for every batch.
    """
    total = torch.zeros((), dtype=torch.float64)
    for index, (output, target, batch) in enumerate(zip(outputs, targets, batches, strict=True)):
        mask = TOKENS[tokens](batch).to(output.device)
        distance = (output.float() - target.float()).square().sum(dim=-1)[mask]
        if relative:
            distance = distance / target.float().square().sum(dim=-1)[mask]
        if weights is not None:
            distance = distance * weights[index].to(mask.device)[mask]
        total += distance.sum(dtype=torch.float64).cpu()
    return float(total)
