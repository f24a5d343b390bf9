"""Linears, inputs and the parameters of formats, for tests of kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.linear import QuantLinear

CPU = torch.device("cpu")
A16 = ActivationFormat()
STATIC = ActivationFormat(kind="static_channel", bits=4)
STATIC8 = ActivationFormat(kind="static_channel", bits=8)
TOKEN = ActivationFormat(kind="dynamic_token", bits=4)
TOKEN8 = ActivationFormat(kind="dynamic_token", bits=8)
CENTERED = ActivationFormat(kind="dynamic_token", bits=4, centered=True)
CENTERED8 = ActivationFormat(kind="dynamic_token", bits=8, centered=True)
NORMAL = ActivationFormat(kind="dynamic_token", bits=4, centered=True, normal=True)


def int_format(bits, group_size=128, **more):
    return WeightFormat(kind="int", bits=bits, group_size=group_size, **more)


@dataclass(frozen=True)
class Problem:
    """A Linear, inputs [T, I] and what static formats know of them."""

    linear: nn.Linear
    x: Tensor

    @classmethod
    def draw(cls, shape=(64, 256), tokens=70, outliers=0, size=20.0, bias=True, dtype=torch.float32, seed=0):
        """Normal inputs; ``outliers`` channels are ``size`` times as large."""
        torch.manual_seed(seed)
        rows, columns = shape
        linear = nn.Linear(columns, rows, bias=bias).to(dtype)
        x = torch.randn(tokens, columns) * (0.2 * torch.randn(columns)).exp() + 0.3 * torch.randn(columns)
        x[:, torch.randperm(columns)[:outliers]] *= size
        return cls(linear, x.to(dtype))

    def to(self, device):
        """The same on a device."""
        return Problem(self.linear.to(device), self.x.to(device))

    def parameters(self, activation, mean=False):
        if activation.kind == "static_channel":
            bounds = {"lower": self.x.float().amin(0), "upper": self.x.float().amax(0)}
            return bounds | ({"mean": self.x.float().mean(0)} if mean else {})
        values = {"clip_ratio": torch.tensor([0.95])} if activation.kind == "dynamic_token" else {}
        return values | ({"center": self.x.float().mean(0)} if activation.centered else {})

    def quantized(self, kernel: Kernel, weight: WeightFormat, activation: ActivationFormat, **more) -> QuantLinear:
        parameters = self.parameters(activation) | more
        return QuantLinear.from_linear(self.linear, weight, activation, parameters, kernel)

    @torch.no_grad()
    def outputs(self, kernel, weight, activation, x=None, **more):
        return self.quantized(kernel, weight, activation, **more)(self.x if x is None else x)

    @torch.no_grad()
    def full(self):
        return nn.functional.linear(self.x.float(), self.linear.weight.float(), self.linear.bias.float())

    def distance(self, kernel, weight, activation, **more):
        """Relative distance of the outputs to the reference's."""
        return relative(
            self.outputs(kernel, weight, activation, **more), self.outputs(REFERENCE, weight, activation, **more)
        )

    def error(self, kernel, weight, activation, **more):
        """Relative distance of the outputs to those in full precision."""
        return relative(self.outputs(kernel, weight, activation, **more), self.full())


def relative(values, expected):
    values, expected = values.detach().float(), expected.detach().float()
    return float((values - expected).norm() / expected.norm())
