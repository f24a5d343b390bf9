"""Linears that read the same tensor rotate and round it once.

Query, key and value projections read one input, gate and up projections another. The first of them stores what it
computed in an attribute of the input, where the others find it; it is freed with the input.

A stored result is used only if it cannot differ: its operands must be the same tensors in the same version, and each
Linear uses it once. A Linear that asks again is in another forward pass; tensors of inference mode have no version that
would show whether they were changed in between. With gradients, each Linear computes its own result, so that gradients
are summed in the same order as without sharing. torch.compile removes common subexpressions itself.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

ROUNDING = ("lower", "upper", "step", "inverse", "low", "index", "clip_ratio", "center")
"""Names of the run-time tensors that inputs are rounded with."""

_ATTRIBUTE = "_qvlm_computed"


@dataclass(frozen=True, eq=False)
class _Computed:
    """A stored result.

    Attributes:
        key: what was computed, from which versions of which tensors.
        operands: these tensors without the input; kept alive, so that no other tensor gets their ``id``.
        result: must not refer to the input.
        users: the ``id`` of the run-time tensors of each Linear that used the result.
    """

    key: Hashable
    operands: tuple[Tensor, ...]
    result: object
    users: set[int] = field(default_factory=set)


def once(
    x: Tensor, tensors: Mapping[str, Tensor], names: Sequence[str], kind: Hashable, compute: Callable[[], Result]
) -> Result:
    """The result of ``compute()``, or the stored result if another Linear has computed it.

    Args:
        x: the input.
        tensors: run-time tensors of the Linear that asks.
        names: names of the tensors that the result depends on in addition to the input; if there are none, nothing is
            shared.
        kind: identifies the computation.
        compute: a function of the input and these tensors; its result must not refer to the input.
    """
    operands = tuple(tensors[name] for name in names)
    if torch.compiler.is_compiling() or not operands:
        return compute()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *operands)):
        return compute()
    key = (kind, *((id(tensor), None if tensor.is_inference() else tensor._version) for tensor in (x, *operands)))
    found = getattr(x, _ATTRIBUTE, None)
    if found is None or found.key != key or id(tensors) in found.users:
        found = _Computed(key, operands, compute())
        setattr(x, _ATTRIBUTE, found)
    found.users.add(id(tensors))
    return found.result
