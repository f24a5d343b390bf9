"""Products with packed weights that are dequantized some rows at a time, for many tokens on a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor

PART = 12 * 2**20
"""Number of weights to dequantize at a time. Larger temporaries take more memory, and get it anew at each call; smaller
products read the input too often."""

LEAST_ROWS = 1024
"""Least number of rows of a part, if the weight has so many. With 600 tokens and two threads, bfloat16's product on
AMX takes twice as long per row with 320 to 704 rows as with 768 or more (4 to 6 times with 256)."""


def rows_at_once(rows: int, columns: int, multiple: int) -> int:
    """Number of a weight's rows to dequantize at a time: all, or a multiple of ``multiple`` in almost equal parts."""
    parts = max(1, min(-(-rows * columns // PART), rows // LEAST_ROWS))
    return min(rows, -(-rows // parts // multiple) * multiple)


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
