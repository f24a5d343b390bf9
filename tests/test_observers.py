import pytest
import torch

from qvlm_plugin.observers import ChannelStatistics, channel_lp_losses, token_lp_losses
from qvlm_plugin.quantizers import fake_quantize, token_range


def test_merging_batches_equals_seeing_all_at_once():
    torch.manual_seed(0)
    x = torch.randn(30, 5)
    merged = ChannelStatistics.of(x[:7]).merge(ChannelStatistics.of(x[7:11])).merge(ChannelStatistics.of(x[11:]))
    assert torch.equal(merged.lower, x.amin(dim=0)) and torch.equal(merged.upper, x.amax(dim=0))
    assert torch.allclose(merged.mean, x.mean(dim=0), atol=1e-6) and merged.count == 30


def test_mean_of_a_constant_channel_lies_within_its_extremes():
    statistics = ChannelStatistics.of(torch.full((1000, 2), 0.1))
    assert torch.equal(statistics.mean, statistics.lower)
    assert all(torch.equal(bound, statistics.lower) for bound in statistics.range(0.7))


@pytest.mark.parametrize("p", [0.5, 2.0])
def test_losses_are_sums_over_elements_and_add_over_batches(p):
    torch.manual_seed(0)
    x, ratios = torch.randn(20, 4), (1.0, 0.8)
    statistics = ChannelStatistics.of(x)
    losses = channel_lp_losses(x, statistics, ratios, 4, p)
    assert losses.shape == (2, 4)
    for row, ratio in zip(losses, ratios, strict=True):
        error = fake_quantize(x, *statistics.range(ratio), 4) - x
        for loss, channel in zip(row, error.T, strict=True):
            assert float(loss) == pytest.approx(sum(abs(float(v)) ** p for v in channel), rel=1e-4)
    halves = sum(channel_lp_losses(half, statistics, ratios, 4, p) for half in x.split(10))
    assert torch.allclose(losses, halves)
    token = token_lp_losses(x, ratios, 4, p)
    assert float(token[1]) == pytest.approx(float((fake_quantize(x, *token_range(x, 0.8), 4) - x).abs().pow(p).sum()))


def test_a_lone_outlier_makes_a_narrower_range_better():
    torch.manual_seed(0)
    x = torch.randn(2000, 1)
    x[0] = 20
    losses = channel_lp_losses(x, ChannelStatistics.of(x), (1.0, 0.5), 3, 1.0)
    assert losses[1] < losses[0]
