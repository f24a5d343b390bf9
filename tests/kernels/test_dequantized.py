import pytest
import torch
import torch.nn.functional as F

from qvlm_plugin.kernels.dequantized import LEAST_ROWS, PART, product_by_rows, rows_at_once


@pytest.mark.parametrize("some", [16, 40, 96])
@pytest.mark.parametrize("with_bias", [True, False])
def test_parts_of_a_product_equal_the_whole_to_the_bit(some, with_bias):
    x, weight = torch.randn(70, 192).bfloat16(), torch.randn(96, 192).bfloat16()
    bias = torch.randn(96).bfloat16() if with_bias else None
    memory, spans = torch.empty(some, 192).bfloat16(), []

    def dequantize(span):
        spans.append((span.start, span.stop))
        return memory[: span.stop - span.start].copy_(weight[span])

    assert torch.equal(product_by_rows(x, 96, some, dequantize, bias), F.linear(x, weight, bias))
    assert [start for start, _ in spans] == list(range(0, 96, some)) and spans[-1][1] == 96


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(4096, 4096), (32, 64), (48, 2 * PART), (11008, 4096), (4096, 11008), (5120, 13824), (32064, 4096), (1000, 2**15)],
)
def test_rows_at_once(rows, columns):
    some = rows_at_once(rows, columns, 32)
    assert some == rows or some % 32 == 0
    assert some <= LEAST_ROWS + 32 or some * columns <= PART + 32 * columns
    last = rows % some or some
    assert some == rows or min(some, last) >= 0.75 * LEAST_ROWS
