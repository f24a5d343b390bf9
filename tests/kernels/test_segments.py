from itertools import product

import pytest
import torch

from qvlm_plugin.kernels.segments import segment_widths


def cost(widths, step):
    return sum(float(part[-1]) ** 2 * len(part) for part in step.split(list(widths)))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [8, 20, 30])
def test_borders_cost_least(columns, count):
    torch.manual_seed(columns)
    step = (5 * torch.rand(columns)).exp().sort().values
    widths = segment_widths(step, count, 4)
    pieces = -(-columns // 4)
    lengths = [4 * n for n in range(1, pieces + 1)]
    allowed = [
        (*split[:-1], split[-1] - (-columns % 4))
        for parts in range(1, count + 1)
        for split in product(lengths, repeat=parts)
        if sum(split) == 4 * pieces
    ]
    assert sum(widths) == columns and 1 <= len(widths) <= count
    assert all(width % 4 == 0 for width in widths[:-1])
    assert cost(widths, step) == pytest.approx(min(cost(split, step) for split in allowed))


def test_massive_channels_are_kept_apart():
    step = torch.cat([torch.linspace(1, 2, 2040), torch.full((8,), 1e4)])
    assert segment_widths(step, 2, 8) == (2040, 8)
    assert segment_widths(torch.zeros(64), 4, 8)[-1] > 0
    assert segment_widths(torch.ones(5), 4, 8) == (5,)
