"""Triton's kernels in Triton's interpreter, for `emulated_cuda`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, _patch_lang
from triton.runtime.jit import JITFunction

CAN_BE_LEFT = hasattr(InterpretedFunction, "run")
"""Of older versions of Triton nothing compiles any more once something was interpreted."""


@contextmanager
def interpreted(start: Callable[[str, list[Tensor]], list[Tensor]]) -> Iterator[None]:
    """Run kernels on the CPU that are launched in the context.

    Args:
        start: a kernel's name and tensors → the tensors to compute with.
    """

    def run(kernel: JITFunction, *args: object, grid: tuple, warmup: bool = False, **options: object) -> None:
        places = [place for place, arg in enumerate(args) if isinstance(arg, Tensor)]
        operands, values = list(args), start(kernel.__name__, [args[place] for place in places])
        # The interpreter truncates to bfloat16, where devices round to the nearest: let torch round.
        wide = {id(value): value.float() for value in values if value.dtype == torch.bfloat16}
        for place, value in zip(places, values, strict=True):
            operands[place] = wide.get(id(value), value)
        InterpretedFunction(kernel.fn).run(*operands, grid=grid, warmup=warmup, **options)
        for value in values:
            if id(value) in wide:
                value.copy_(wide[id(value)])

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(JITFunction, "__call__", _called):
        yield


def _called(function: JITFunction, *args: object, **named: object) -> object:
    """A function of Triton that a kernel calls."""
    scope = _patch_lang(function.fn)
    try:
        return InterpretedFunction(function.fn).rewrite()(*args, **named)
    finally:
        scope.restore()
