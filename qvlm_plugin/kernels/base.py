"""A kernel: which Linears it can run, which tensors it keeps, and how it multiplies."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qvlm_plugin.formats import ActivationFormat, WeightFormat


@dataclass(frozen=True)
class Kernel:
    """The arithmetic of a quantized Linear.

    Its tensors have two forms. Neutral tensors are the same on every device and are stored in files; run-time tensors
    are laid out for the operator of one device. Everything static that a forward pass needs (group sizes, segments)
    follows from the tensors' shapes, so that a compiler sees constants.

    Attributes:
        name: name in ``backend=`` and in results.
        obstacle: (weight format, activation format, shape [O, I], device) → why this kernel cannot run such a module,
            in a few words; None if it can.
        prepare: (weight [O, I], bias [O] or None, formats, the parameters they name) → neutral tensors by name, with
            ``bias`` if the product adds one; with a ``mean`` parameter, this is the `corrected_bias`.
        pack: (neutral tensors, activation format, device) → run-time tensors by name, which `QuantLinear` stores.
        forward: (x [..., I], run-time tensors, activation format) → [..., O] in the dtype of x.
        restore: (neutral tensors, activation format) → neutral tensors of the reference kernel that compute the same
            up to rounding; used for a stored model on a device on which this kernel cannot run.
        cast: names of the run-time tensors that ``model.to(dtype)`` casts; all others keep their dtype.
        tolerance: relative output error up to which the self-test passes.
    """

    name: str
    obstacle: Callable[[WeightFormat, ActivationFormat, tuple[int, int], torch.device], str | None]
    prepare: Callable[[Tensor, Tensor | None, WeightFormat, ActivationFormat, Mapping[str, Tensor]], dict[str, Tensor]]
    pack: Callable[[Mapping[str, Tensor], ActivationFormat, torch.device], dict[str, Tensor]]
    forward: Callable[[Tensor, Mapping[str, Tensor], ActivationFormat], Tensor]
    restore: Callable[[Mapping[str, Tensor], ActivationFormat], dict[str, Tensor]] | None = None
    cast: tuple[str, ...] = ()
    tolerance: float = 0.01

    def supports(
        self,
        weight_format: WeightFormat,
        activation_format: ActivationFormat,
        shape: tuple[int, int],
        device: torch.device,
    ) -> bool:
        """Whether this kernel can run such a module; see `obstacle`."""
        return self.obstacle(weight_format, activation_format, shape, device) is None


def corrected_bias(weight: Tensor, rounded: Tensor, bias: Tensor | None, mean: Tensor | None) -> Tensor | None:
    """The bias that keeps the mean output unchanged (Nagel et al., 2019, "Data-free quantization", section 4.2).

    Args:
        weight, rounded: the weight before and after rounding, [O, I].
        bias: [O] or None.
        mean: mean of the inputs, [I]; None corrects nothing.

    Returns:
        ``bias + (weight - rounded) mean`` in the dtype of ``weight``; None for no bias.
    """
    if mean is None:
        return bias
    shift = (weight.float() - rounded.float()) @ mean.float()
    return (shift if bias is None else bias.float() + shift).to(weight.dtype)


def with_parameters(
    tensors: Mapping[str, Tensor],
    bias: Tensor | None,
    activation_format: ActivationFormat,
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """A weight's neutral tensors, with the parameters that round the input, and the bias if there is one."""
    rounding = {name: parameters[name] for name in activation_format.parameters}
    return {**tensors, **rounding, **({} if bias is None else {"bias": bias})}


def like_input(output: Tensor, x: Tensor) -> Tensor:
    """An output [N, O] in the type and leading shape of its input ``x`` [..., I]."""
    return output.to(x.dtype).view(*x.shape[:-1], output.shape[-1])


def as_stored(
    tensors: Mapping[str, Tensor], activation_format: ActivationFormat, device: torch.device
) -> dict[str, Tensor]:
    """The `Kernel.pack` of kernels that compute with the neutral layout."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}
