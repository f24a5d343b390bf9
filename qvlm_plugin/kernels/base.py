"""What an arithmetic is: which formats it supports, the tensors it keeps, and the product it computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qvlm_plugin.formats import ActivationFormat, WeightFormat


@dataclass(frozen=True)
class Kernel:
    """One arithmetic.

    Attributes:
        name: as ``backend=`` and results state it.
        supports: (weight format, activation format, device) → whether this kernel runs them there.
        prepare: (weight [O, I], formats, the parameters they name) → the named tensors that `QuantLinear` holds.
        forward: (x [..., I], those tensors, bias [O] or None, activation format) → [..., O] in the dtype of x.
    """

    name: str
    supports: Callable[[WeightFormat, ActivationFormat, torch.device], bool]
    prepare: Callable[[Tensor, WeightFormat, ActivationFormat, Mapping[str, Tensor]], dict[str, Tensor]]
    forward: Callable[[Tensor, Mapping[str, Tensor], Tensor | None, ActivationFormat], Tensor]
