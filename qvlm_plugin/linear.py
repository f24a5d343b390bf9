"""QuantLinear: the one module that replaces nn.Linear."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels import fusable, fused
from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.kernels.sharing import ROUNDING, once
from qvlm_plugin.rotation import rotate


class QuantLinear(nn.Module):
    """A Linear whose weight and input are quantized.

    Methods determine the values of its tensors; kernels pack and read them. The tensors are parameters without
    gradient, so that accelerate moves and offloads them like any weight.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        weight_format: WeightFormat,
        activation_format: ActivationFormat,
        kernel: Kernel,
        shape: tuple[int, int],
    ) -> None:
        """Register a kernel's run-time tensors for a weight of ``shape`` [O, I]."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.weight_format, self.activation_format, self.kernel = weight_format, activation_format, kernel
        self.tensor_names: tuple[str, ...] = ()
        self.rotation_names: tuple[str, ...] = ()
        self.set_tensors(tensors)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        weight_format: WeightFormat,
        activation_format: ActivationFormat,
        parameters: Mapping[str, Tensor],
        kernel: Kernel,
    ) -> "QuantLinear":
        """Quantize ``linear``; ``parameters`` are the tensors that the two formats name."""
        weight, bias = linear.weight.detach(), linear.bias
        neutral = kernel.prepare(weight, bias, weight_format, activation_format, parameters)
        tensors = kernel.pack(neutral, activation_format, weight.device)
        return cls(tensors, weight_format, activation_format, kernel, (linear.out_features, linear.in_features))

    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the module's tensors."""
        for name in self.tensor_names:
            delattr(self, name)
        self.tensor_names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))

    def rotate_inputs(self, factors: Sequence[Tensor]) -> None:
        """Multiply inputs by a rotation's `factors` before they are rounded; the weight must already be rotated."""
        self.rotation_names = tuple(f"rotation_{index}" for index in range(len(factors)))
        for name, factor in zip(self.rotation_names, factors, strict=True):
            self.register_parameter(name, nn.Parameter(factor.detach(), requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        # ``model.to(dtype)`` changes the compute type; a cast would round the scales and bounds that were searched.
        kept = {
            id(getattr(self, name))
            for name in (*self.tensor_names, *self.rotation_names)
            if name not in self.kernel.cast
        }

        def keeping_dtypes(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if id(tensor) in kept and result.dtype != tensor.dtype else result

        return super()._apply(keeping_dtypes, recurse)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight: output and input channels."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → [..., out_features]."""
        return self.kernel.forward(self.rotated(x), self._parameters, self.activation_format)

    def rotated(self, x: Tensor) -> Tensor:
        """The input after the rotation, if there is one: the tensor that is rounded."""
        if not self.rotation_names:
            return x
        factors = [self._parameters[name] for name in self.rotation_names]

        def compute() -> Tensor:
            return fused.rotate(x, factors) if fusable.rotations(x, factors) else rotate(x, factors)

        return once(x, self._parameters, self.rotation_names, "rotated", compute)

    def extra_repr(self) -> str:
        """Shape, formats and kernel, for ``print(model)``."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        rotated = ", rotated" if self.rotation_names else ""
        return f"{shape}, {self.weight_format}, {self.activation_format}{rotated}, kernel={self.kernel.name}"


def share_parameters(layers: Iterable[QuantLinear]) -> None:
    """Let Linears that read the same tensor share equal rounding parameters, so that its rounding is computed `once`.

    All Linears of a site have the same bounds, but each has its own copies, or computed its own steps.
    """
    first, *others = layers
    for layer in others:
        for name in (*ROUNDING, *first.rotation_names):
            mine, theirs = first._parameters.get(name), layer._parameters.get(name)
            if mine is None or theirs is None or mine is theirs or mine.device != theirs.device:
                continue
            if mine.dtype == theirs.dtype and torch.equal(mine, theirs):
                layer.register_parameter(name, mine)
