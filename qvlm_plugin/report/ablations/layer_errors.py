"""Errors of the decoder layers' outputs in a quantized model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qvlm_plugin import plugins
from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.conversation import to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.methods.replacements import quantized_modules, replaced
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.models.placement import execution_device
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.progress import track
from qvlm_plugin.topology import blocks_of


def unseen_samples(samples: CalibrationSet, plan: RoundingPlan) -> CalibrationSet:
    """The samples that the plan was not calibrated on.

    Raises:
        QVLMError: none is left.
    """
    kept = samples.without(set(plan.calibration.digests if plan.calibration else ()))
    if not kept:
        raise QVLMError(f"the plan was calibrated on all samples of {samples.source!r}; name others with --held-out")
    return replace(samples, samples=kept)


@dataclass(frozen=True, eq=False)
class LayerErrors:
    """Relative squared errors of decoder layers' outputs, for each sample; float64 [samples, layers].

    Attributes:
        whole: ‖x_q - x_r‖² / ‖x_r‖² over all tokens of a sample; a few tokens with massive activations dominate it.
        token: the same for each token, averaged over tokens.
    """

    whole: Tensor
    token: Tensor


@torch.no_grad()
def layer_errors(loaded: LoadedModel, plan: RoundingPlan, samples: CalibrationSet, batch_size: int) -> LayerErrors:
    """Error of every decoder layer's output under a plan (Figure 3c).

    x_q is the output in the fully quantized model, tower and projector included, so it contains the errors of earlier
    layers. Padding is left out.

    Args:
        loaded: the model in full precision; it is not changed.
        plan: a plan for this model.
        samples: samples that the plan was not calibrated on, see `unseen_samples`.
        batch_size: samples per forward pass.
    """
    model = loaded.model
    layers = [layer for _, layer in blocks_of(plugins.topology_of(loaded), model, "decoder")]
    quantized = quantized_modules(plan, model, REFERENCE)
    rows = []
    batches = samples.batches(loaded.processor, batch_size)
    total = -(-len(samples.samples) // batch_size)
    for inputs, _ in track(batches, "layer errors", total):
        attended = inputs["attention_mask"].bool()
        prepared = to_device(inputs, execution_device(model), model.dtype)
        reference = _layer_outputs(model, layers, prepared)
        with replaced(model, quantized):
            outputs = _layer_outputs(model, layers, prepared)
        pairs = zip(outputs, reference, strict=True)
        rows.append(torch.stack([relative_errors(output, target, attended) for output, target in pairs], dim=-1))
    return LayerErrors(*torch.cat(rows, dim=1))


def relative_errors(output: Tensor, target: Tensor, attended: Tensor) -> Tensor:
    """Squared distance of ``output`` from ``target`` over the target's squared norm, at attended tokens.

    Args:
        output, target: [B, T, C].
        attended: bool [B, T].

    Returns:
        float64 [2, B] on the CPU: over each sample as a whole, and the mean over its tokens.
    """
    distance, norm = (x.float().square().sum(dim=-1).double().cpu() for x in (output.float() - target.float(), target))
    attended = attended.cpu()
    whole = (distance * attended).sum(dim=1) / (norm * attended).sum(dim=1)
    token = torch.where(attended, distance / norm, 0).sum(dim=1) / attended.sum(dim=1)
    return torch.stack([whole, token])


def _layer_outputs(model: nn.Module, layers: list[nn.Module], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with _recording(layers) as outputs:
        model(**inputs, use_cache=False, logits_to_keep=1)
    return outputs


@contextmanager
def _recording(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """A context in which forward passes append the layers' outputs to the list, in order."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
