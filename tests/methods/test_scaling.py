import pytest
import torch

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels.reference import round_weight
from qvlm_plugin.methods.scaling import channel_scale, produced_magnitude, scale_grid, search_scale
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
