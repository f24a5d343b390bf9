"""Products with packed weights that are dequantized some rows at a time, for many tokens on a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor

PART = 6 * 2**20
"""Number of weights to dequantize at a time (2**20 to 2**25 were measured at 1024 to 11008 columns, 600 tokens,
AVX-512, two threads). Larger temporaries get new memory at each call; smaller products read the input too often."""


def rows_at_once(rows: int, columns: int, multiple: int) -> int:
    """Number of a weight's rows to dequantize at a time: all, or a multiple of ``multiple``."""
    return min(rows, max(1, PART // columns // multiple) * multiple)


def product_by_rows(
    x: Tensor, rows: int, step: int, dequantize: Callable[[slice], Tensor], bias: Tensor | None
) -> Tensor:
    """Multiply by the transpose of a weight, and add a bias; in bfloat16 bitwise equal to using the whole weight.

    Args:
        x: [N, I].
        rows: number of the weight's rows, O.
        step: number of rows to dequantize at a time.
        dequantize: slice of rows → these rows of the weight, [rows, I] in the dtype of ``x``; may return the same
            memory at every call.
        bias: [O] or None.

    Returns:
        [N, O].
    """
    out = x.new_empty(len(x), rows)
    for start in range(0, rows, step):
        span = slice(start, min(start + step, rows))
        weight = dequantize(span).t()
        if bias is None:
            torch.mm(x, weight, out=out[:, span])
        else:
            torch.addmm(bias[span], x, weight, out=out[:, span])  # rounded once, like a Linear
    return out
