import pytest
import torch

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels.reference import round_weight
from qvlm_plugin.methods.scaling import (
    channel_scale,
    duo_scale_grid,
    produced_magnitude,
    scale_grid,
    search_scale,
    weight_shares,
)
from qvlm_plugin.plan_header import Fold

ONE_TO_ONE = Fold(site="site", producer="producer")
SHARED_HEADS = Fold(site="site", producer="producer", head_dim=4)
FORMATS = [
    WeightFormat(kind="int", bits=3, group_size=8),
    WeightFormat(kind="int", bits=4, symmetric=True),
    WeightFormat(kind="nf", bits=3, double_quantization=True),
]


def tokens_with_outliers(columns=24):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(50, columns, generator=generator)
    tokens[:, ::5] *= 30
    return tokens


def test_scales_are_normalised_powers_and_safe_for_dead_channels():
    magnitude = torch.tensor([4.0, 1.0, 9.0, 0.25])
    assert torch.equal(channel_scale(magnitude, 0), torch.ones(4))
    half = channel_scale(magnitude, 0.5)
    assert torch.allclose(half / half[1], torch.tensor([2.0, 1.0, 3.0, 0.5]))
    assert float(half.max() * half.min()) == pytest.approx(1)
    dead = channel_scale(torch.tensor([1.0, 0.0]), 0.95)
    assert dead.isfinite().all() and (dead > 0).all() and dead[1] < dead[0]
    assert torch.equal(channel_scale(torch.zeros(3), 0.5), torch.ones(3))


def test_readers_of_a_shared_head_are_averaged():
    tokens = tokens_with_outliers()  # 6 heads of 4 read 3 heads: 0 0 1 1 2 2
    magnitude = produced_magnitude(tokens, SHARED_HEADS, 12)
    for channel in range(12):
        readers = [8 * (channel // 4) + channel % 4, 8 * (channel // 4) + 4 + channel % 4]
        assert float(magnitude[channel]) == pytest.approx(float(tokens[:, readers].abs().mean()), rel=1e-5)
    scale = channel_scale(magnitude, 0.5)
    assert torch.equal(SHARED_HEADS.spread(scale, 24)[4:8], scale[:4])


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("fold, channels", [(ONE_TO_ONE, 24), (SHARED_HEADS, 12)])
def test_no_scale_of_the_grid_errs_less_at_the_outputs(fmt, fold, channels):
    tokens = tokens_with_outliers()
    weights = [torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows)) for rows in (16, 9)]

    def error(scale):
        spread = fold.spread(scale, 24)
        return sum(
            float((tokens @ w.T - (tokens / spread) @ round_weight(w * spread, fmt).T).square().sum()) for w in weights
        )

    scales = scale_grid(produced_magnitude(tokens, fold, channels), 20)
    found, grid = error(search_scale(weights, fmt, tokens, fold, scales)), [error(scale) for scale in scales]
    assert grid[0] == error(torch.ones(channels))
    assert found == pytest.approx(min(grid), rel=1e-4)
    assert found < grid[0]  # large activations make scaling worth it


def test_a_grid_of_one_step_scales_nothing():
    (scale,) = scale_grid(tokens_with_outliers().abs().mean(dim=0), 1)
    assert torch.equal(scale, torch.ones(24))


@pytest.mark.parametrize("fmt, size", [(FORMATS[0], 8), (FORMATS[1], 20), (FORMATS[2], 64)], ids=str)
def test_shares_of_weights_are_means_over_outputs_of_magnitudes_within_groups(fmt, size):
    weights = [torch.randn(rows, 20, generator=torch.Generator().manual_seed(rows)) for rows in (16, 9)]
    weights[0][3, 8:16] = 0
    expected = torch.zeros(20)
    for weight in weights:
        relative = torch.zeros_like(weight)
        lines = weight.view(1, -1) if fmt.kind == "nf" else weight  # normal-float blocks run on through the rows
        for line, target in zip(lines, relative.view(lines.shape), strict=True):
            for start in range(0, len(line), size):
                group = line[start : start + size].abs()
                target[start : start + size] = group / max(float(group.max()), 1e-30)
        expected += relative.sum(dim=0)
    assert torch.allclose(weight_shares(weights, fmt), expected / 25, rtol=1e-5)


def test_duo_scales_grow_with_inputs_and_shrink_with_weights():
    magnitude, shares = torch.tensor([4.0, 1.0, 9.0, 0.25]), torch.tensor([0.5, 0.25, 0.5, 0.75])
    ones, *grid = duo_scale_grid(magnitude, shares, 4)
    assert torch.equal(ones, torch.ones(4)) and len(grid) == 3
    for alpha, scale in zip((0, 0.5, 1), grid, strict=True):
        wanted = magnitude**alpha / shares ** (1 - alpha)
        assert torch.allclose(scale / scale[0], wanted / wanted[0])
        assert float(scale.max() * scale.min()) == pytest.approx(1)


def test_duo_scales_are_safe_for_dead_channels_and_few_steps():
    dead = duo_scale_grid(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.5, 1.0]), 5)
    assert all(scale.isfinite().all() and (scale > 0).all() for scale in dead)
    assert all(torch.equal(scale, torch.ones(3)) for scale in duo_scale_grid(torch.zeros(3), torch.zeros(3), 5))
    assert [len(duo_scale_grid(torch.ones(3), torch.ones(3), steps)) for steps in (1, 2, 3)] == [1, 2, 3]
