"""What all Linears of a site make of the tensor that they read is computed by the first of them.

Queries, keys and values round the same input, gate and up projections another. What the first of them computed is kept
for the others as long as the input lives, and no longer: it is an attribute of the input.

It is used again only where it cannot differ: for the very tensors that it was computed from, as they were then, and
once for each Linear. One that comes again begins another forward pass; this is for inputs made in inference mode, which
do not know when they were written to. Where gradients are taken each Linear computes for itself, so that they are
summed in the same order as without sharing. What is compiled computes nothing twice by itself.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

ROUNDING = ("lower", "upper", "step", "inverse", "low", "index", "clip_ratio", "center")
"""Names that run-time tensors have which inputs are rounded by."""

_ATTRIBUTE = "_qvlm_computed"


@dataclass(frozen=True, eq=False)
class _Computed:
    """A result.

    Attributes:
        key: what was computed of which versions of which tensors.
        operands: these; held, for no other tensor to take their place in memory.
        result: not, and without reference to, the input.
        users: the Linears that have it.
    """

    key: Hashable
    operands: tuple[Tensor, ...]
    result: object
    users: set[int] = field(default_factory=set)


def once(
    x: Tensor, tensors: Mapping[str, Tensor], names: Sequence[str], what: Hashable, compute: Callable[[], Result]
) -> Result:
    """``compute()``, or what it gave another Linear.

    Args:
        x: the input.
        tensors: run-time tensors of the Linear that asks.
        names: of those that the result follows from, besides the input; where there are none, nothing is shared.
        what: is computed.
        compute: a function of these, not differentiable here; its result does not refer to the input.
    """
    operands = tuple(tensors[name] for name in names)
    if torch.compiler.is_compiling() or not operands:
        return compute()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *operands)):
        return compute()
    key = (what, *((id(tensor), None if tensor.is_inference() else tensor._version) for tensor in (x, *operands)))
    found = getattr(x, _ATTRIBUTE, None)
    if found is None or found.key != key or id(tensors) in found.users:
        found = _Computed(key, operands, compute())
        setattr(x, _ATTRIBUTE, found)
    found.users.add(id(tensors))
    return found.result
