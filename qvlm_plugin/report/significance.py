"""Test paired differences: the sign-flip test, and Holm's adjustment for several tests."""

from collections.abc import Sequence

import numpy as np
from scipy import special

_SUPPORT = 2_000_000
"""Maximum number of values of an exact distribution; larger distributions are sampled."""

DRAWS = 99_999
"""Number of samples from a distribution that is too large to compute."""


def sign_flip_p(sums: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of Fisher's paired randomization test, which flips the signs of the clusters' differences.

    Clusters with differences of the same size share a binomial distribution, so the total is a sum of a few scaled
    binomials. Its distribution is computed exactly unless it has too many values; then it is sampled. For scores of 0
    and 1 and independent documents this is McNemar's exact test.

    Args:
        sums: the clusters' summed differences, float64[clusters].
        seed: seed of the sampling.

    Returns:
        The probability of a total at least as far from 0; at least 1/100,000 if sampled.
    """
    sums = sums[np.abs(sums) > 1e-12]  # differences that cancel leave rounding errors
    if not len(sums):
        return 1.0
    sums = sums / np.abs(sums).max()
    _, first, counts = np.unique(np.abs(sums).round(9), return_index=True, return_counts=True)
    sizes = np.abs(sums)[first]
    observed = abs(sums.sum()) - 1e-8  # rounding makes equal totals differ
    support, mass = np.zeros(1), np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        if len(support) * (count + 1) > _SUPPORT:
            return _drawn_p(sizes, counts, observed, seed)
        positive = np.arange(count + 1)
        support = np.add.outer(support, size * (2 * positive - count)).ravel()
        mass = np.multiply.outer(mass, _fair_binomial(count)).ravel()
        _, first, where = np.unique(support.round(9), return_index=True, return_inverse=True)
        support, mass = support[first], np.bincount(where, weights=mass)
    return min(1.0, float(mass[np.abs(support) >= observed].sum()))


def _fair_binomial(count: int) -> np.ndarray:
    """Probabilities of 0 … ``count`` heads among ``count`` tosses of a fair coin, float64[count + 1]."""
    heads = np.arange(count + 1)
    return np.exp(-special.betaln(heads + 1, count - heads + 1) - np.log(count + 1) - count * np.log(2))


def _drawn_p(sizes: np.ndarray, counts: np.ndarray, observed: float, seed: int) -> float:
    generator = np.random.default_rng(seed)
    block = max(1, _SUPPORT // len(sizes))
    extreme = 0
    for start in range(0, DRAWS, block):
        shape = (min(block, DRAWS - start), len(sizes))
        totals = (2 * generator.binomial(counts, 0.5, shape) - counts) @ sizes
        extreme += int((np.abs(totals) >= observed).sum())
    return (extreme + 1) / (DRAWS + 1)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm-adjusted p values, in the order given."""
    order = np.argsort(ps)
    adjusted = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1)).clip(max=1)
    return adjusted[np.argsort(order)].tolist()


def p_text(p: float, unknown: int = 0) -> str:
    """A p value for a table; followed by a question mark if the images of any documents are unknown."""
    return (f"{p:.3f}" if p >= 0.001 else f"{p:.1e}") + ("?" if unknown else "")
