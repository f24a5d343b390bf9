"""Products with packed weights that are dequantized some rows at a time, for many tokens on a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor

PART = 6 * 2**20
"""Weights to dequantize at a time (measured at 1024 to 11008 columns, 600 tokens, AVX-512, two threads: 2**20 to
2**25). Larger temporaries are new memory at each call; smaller products read the input too often."""


def rows_at_once(rows: int, columns: int, multiple: int) -> int:
    """How many of a weight's rows to dequantize at a time: all, or a multiple of ``multiple``."""
    return min(rows, max(1, PART // columns // multiple) * multiple)


def product_by_rows(
    x: Tensor, rows: int, some: int, dequantize: Callable[[slice], Tensor], bias: Tensor | None
) -> Tensor:
    """Multiply with the transpose of a weight, and add a bias; to the bit what the whole weight would give in bfloat16.

    Args:
        x: [N, I].
        rows: of the weight, O.
        some: rows to dequantize at a time.
        dequantize: these rows → the weight's [their number, I], in the dtype of ``x``; may be the same memory at every
            call.
        bias: [O] or None.

    Returns:
        [N, O].
    """
    out = x.new_empty(len(x), rows)
    for start in range(0, rows, some):
        span = slice(start, min(start + some, rows))
        weight = dequantize(span).t()
        if bias is None:
            torch.mm(x, weight, out=out[:, span])
        else:
            torch.addmm(bias[span], x, weight, out=out[:, span])  # rounded once, like a Linear
    return out
