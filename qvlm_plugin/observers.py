"""Observers: statistics of a Linear's inputs on the calibration set, and quantization ranges chosen from them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qvlm_plugin.quantizers import fake_quantize, shrink_range, token_range


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Extremes and mean of each channel over the tokens seen.

    Attributes:
        lower, upper, total: float32 [C].
        count: tokens seen.
    """

    lower: Tensor
    upper: Tensor
    total: Tensor
    count: int

    @classmethod
    def of(cls, x: Tensor) -> "ChannelStatistics":
        """Statistics of tokens x [N, C]."""
        x = x.float()
        lower, upper = x.aminmax(dim=0)
        return cls(lower, upper, x.sum(dim=0), len(x))

    def __add__(self, other: "ChannelStatistics") -> "ChannelStatistics":
        """Statistics of both sets of tokens together."""
        return ChannelStatistics(
            torch.minimum(self.lower, other.lower),
            torch.maximum(self.upper, other.upper),
            self.total + other.total,
            self.count + other.count,
        )

    def to(self, device: torch.device | str, **options: Any) -> "ChannelStatistics":
        """The statistics on a device; ``options`` are those of `Tensor.to`."""
        names = ("lower", "upper", "total")
        return replace(self, **{name: getattr(self, name).to(device, **options) for name in names})

    @property
    def mean(self) -> Tensor:
        """Channel means, float32 [C], clamped to the extremes."""
        return (self.total / self.count).clamp(self.lower, self.upper)

    def range(self, ratio: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Bounds [C] of a static per-channel quantizer: the extremes, pulled towards the mean by ``ratio`` (or [C])."""
        return shrink_range(self.lower, self.upper, self.mean, ratio)


def chunk_for(device: torch.device) -> tuple[int, bool]:
    """How many rounded elements to process at a time on a device, and whether all candidates go in one batch.

    On a CPU, 2^18 elements stay in the cache, and batches of candidates are no faster (measured with 25 candidates and
    4096 channels) and would change the order of sums. On an accelerator the launch of each operation takes some
    microseconds, in which it processes millions of elements: 2^24 elements make temporaries of 0.3 GB at most, and at
    2 TB/s take ten times as long as the launches.
    """
    return (2**18, False) if device.type == "cpu" else (2**24, True)


@dataclass(frozen=True)
class RangeGrid:
    """Candidate clipping ratios of a quantizer, and their criterion.

    Attributes:
        ratios: R candidates.
        bits: 2 to 8.
        norm: the exponent p of the l_p distance, positive.
        reach: for per-token quantization: see `token_range`.
    """

    ratios: tuple[float, ...]
    bits: int
    norm: float
    reach: float | None = None


def channel_lp_losses(
    x: Tensor, statistics: ChannelStatistics, grid: RangeGrid, weights: Tensor | None = None
) -> Tensor:
    """Sum over tokens of |Q(x) - x|^p under static per-channel quantization, for each candidate ratio and channel.

    The paper initialises the quantizers of its baselines and of Q-VLM by this criterion (section 4.1).

    Args:
        x: tokens [N, C].
        statistics: statistics of the whole calibration set.
        grid: the candidates.
        weights: factors of the elements' losses [N, C]; None: all 1.

    Returns:
        float64 [R, C].
    """
    ratios = grid.ratios
    lower, upper = (torch.stack(bound) for bound in zip(*map(statistics.range, ratios), strict=True))
    total = torch.zeros(len(ratios), x.shape[1], dtype=torch.float64, device=x.device)
    elements, together = chunk_for(x.device)
    count = len(ratios) if together else 1
    rows = -(-elements // (count * x.shape[1]))
    for start in range(0, len(x), rows):
        tokens = x[start : start + rows]
        for first in range(0, len(ratios), count):
            part = slice(first, first + count)
            candidates = tokens.expand(count, -1, -1)
            loss = _lp(fake_quantize(candidates, lower[part, None], upper[part, None], grid.bits), tokens, grid.norm)
            if weights is not None:
                loss.mul_(weights[start : start + rows])
            total[part] += loss.sum(dim=1, dtype=torch.float64)
    return total


def token_lp_losses(x: Tensor, grid: RangeGrid) -> Tensor:
    """Sum of |Q(x) - x|^p under dynamic per-token quantization, for each candidate clipping ratio: float64 [R]."""
    candidates = (fake_quantize(x, *token_range(x, ratio, grid.reach), grid.bits) for ratio in grid.ratios)
    return torch.stack([_lp(candidate, x, grid.norm).sum(dtype=torch.float64) for candidate in candidates])


def best_ratio(losses: Tensor, ratios: Sequence[float]) -> Tensor:
    """The ratio with the least loss; the first of equal ones.

    Args:
        losses: [R], or [R, C] to choose for each channel.
        ratios: R candidates.

    Returns:
        float32, a scalar or [C].
    """
    return losses.new_tensor(ratios, dtype=torch.float32)[losses.argmin(dim=0)]


def _lp(approximation: Tensor, x: Tensor, p: float) -> Tensor:
    return (approximation.float() - x.float()).abs_().pow_(p)
