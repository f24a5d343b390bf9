import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qvlm_plugin import observers
from qvlm_plugin.observers import (
    ChannelStatistics,
    RangeGrid,
    best_ratio,
    channel_lp_losses,
    chunk_for,
    token_lp_losses,
)
from qvlm_plugin.quantizers import fake_quantize, token_range


def test_merging_batches_equals_seeing_all_at_once():
    torch.manual_seed(0)
    x = torch.randn(30, 5)
    merged = ChannelStatistics.of(x[:7]) + ChannelStatistics.of(x[7:11]) + ChannelStatistics.of(x[11:])
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
    losses = channel_lp_losses(x, statistics, RangeGrid(ratios, 4, p))
    assert losses.shape == (2, 4)
    for row, ratio in zip(losses, ratios, strict=True):
        error = fake_quantize(x, *statistics.range(ratio), 4) - x
        for loss, channel in zip(row, error.T, strict=True):
            assert float(loss) == pytest.approx(sum(abs(float(v)) ** p for v in channel), rel=1e-4)
    halves = sum(channel_lp_losses(half, statistics, RangeGrid(ratios, 4, p)) for half in x.split(10))
    assert torch.allclose(losses, halves)
    token = token_lp_losses(x, RangeGrid(ratios, 4, p))
    assert float(token[1]) == pytest.approx(float((fake_quantize(x, *token_range(x, 0.8), 4) - x).abs().pow(p).sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [(1, True), (100, False), (100, True), (2**18, True), (2**24, True)])
def test_losses_are_the_same_in_whatever_chunks(dtype, weighted, chunk, monkeypatch):
    torch.manual_seed(0)
    x, ratios = (3 * torch.randn(200, 6)).to(dtype), (1.0, 0.9, 0.75, 0.6)
    weights = torch.rand(200, 6) if weighted else None
    arguments = x, ChannelStatistics.of(x), RangeGrid(ratios, 4, 2.0), weights
    expected = channel_lp_losses(*arguments)
    monkeypatch.setattr(observers, "chunk_for", lambda device: chunk)
    losses = channel_lp_losses(*arguments)
    assert losses.shape == (4, 6) and losses.dtype == torch.float64
    assert torch.allclose(losses, expected, rtol=1e-12)
    assert torch.equal(best_ratio(losses, ratios), best_ratio(expected, ratios))


class Counting(TorchDispatchMode):
    """Counts the operations that run inside."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_an_accelerator_is_given_few_operations(monkeypatch):
    chunk = chunk_for(torch.device("cuda"))
    monkeypatch.setattr(observers, "chunk_for", lambda device: chunk)
    x, ratios = torch.randn(5000, 128), tuple(1 - index / 100 for index in range(25))
    statistics = ChannelStatistics.of(x)
    with Counting() as few:
        losses = channel_lp_losses(x, statistics, RangeGrid(ratios, 4, 2.0))
    monkeypatch.undo()
    with Counting() as many:
        assert torch.allclose(losses, channel_lp_losses(x, statistics, RangeGrid(ratios, 4, 2.0)), rtol=1e-12)
    ranges = 10 * len(ratios)
    assert few.count < ranges + 50 and many.count > ranges + 50 * len(ratios) / 2


def test_a_lone_outlier_makes_a_narrower_range_better():
    torch.manual_seed(0)
    x = torch.randn(2000, 1)
    x[0] = 20
    losses = channel_lp_losses(x, ChannelStatistics.of(x), RangeGrid((1.0, 0.5), 3, 1.0))
    assert losses[1] < losses[0]
