"""Multiply channels by an orthogonal matrix: a `Rotation` spreads a few massive channels over all.

R = S (M ⊗ H) with a diagonal S of random signs, an orthogonal M of a small order, and a Hadamard matrix H of a power of
two, divided by √order (QuaRot, Ashkboos et al., 2024). M is a Hadamard matrix, too, if one of its order is known: then
all entries of R have the same magnitude, and a single massive channel becomes two values, which any code of two bits or
more represents. Without the signs, the first column of H would turn the mean over channels, which is large after a
GELU, into a massive channel.

H itself is a Kronecker product, so M ⊗ H is a Kronecker product of small matrices, the factors. Multiplying by each
along its axis takes K (outer + 16 + …) multiplications for each token instead of K².
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qvlm_plugin.hadamard import hadamard, has_hadamard, sylvester
from qvlm_plugin.plan_header import Rotation
from qvlm_plugin.quantizers import by_rows, widen

_SINGLE, _FACTOR = 6, 4
"""Up to the first power of two, H is one matrix; a larger H is split into matrices of about the second power (measured
with 600 tokens on two threads with AVX-512: 4,096 channels 2.7 ms with factors of 64 x 64, 2.0 ms with 16 x 16 x 16;
11,008 channels 12.6 ms with 172 x 64, 14.3 ms with 172 x 8 x 8)."""

_LARGEST_OUTER = 512
"""Largest order of M as a Hadamard matrix; if only a larger one exists, M is a random matrix of the odd part."""


def rotation_of(site: str, channels: int, seed: int = 0) -> Rotation:
    """The rotation of a site with ``channels`` input channels.

    M is the smallest Hadamard matrix that fits (576 = 36 * 16, 11008 = 172 * 64); if there is none, a random orthogonal
    matrix whose order is the odd part of ``channels`` (4304 = 269 * 16).
    """
    odd = channels // (channels & -channels)
    outer = odd
    while outer <= min(channels, _LARGEST_OUTER):
        if outer == 1 or has_hadamard(outer):
            return Rotation(site=site, outer=outer, block=channels // outer, seed=seed)
        outer *= 2
    return Rotation(site=site, outer=odd, block=channels // odd, seed=seed)


def factors(rotation: Rotation, device: torch.device | str = "cpu") -> list[Tensor]:
    """The signs [K], and the orthogonal matrices whose Kronecker product is M ⊗ H, from left to right: float32.

    Signs and a random M are drawn on the CPU from a generator with the rotation's seed. M is the orthogonal part of the
    QR decomposition, in float64, of a matrix of normal numbers; signs of its columns that make the diagonal of the
    triangular part positive make the decomposition unique. In float32 it is the same on every machine, up to the last
    digit of a few entries.
    """
    generator = torch.Generator().manual_seed(rotation.seed)
    signs = 1.0 - 2.0 * torch.randint(2, (rotation.channels,), generator=generator)
    found = [signs]
    if rotation.outer > 1:
        found.append(_outer(rotation.outer, generator))
    power = rotation.block.bit_length() - 1
    count = max(min(power, 1), -(-(power - _SINGLE) // _FACTOR) + 1)
    powers = [(power + index) // count for index in range(count)]
    found += [sylvester(power) / 2 ** (power / 2) for power in powers]
    return [factor.to(device) for factor in found]


def _outer(order: int, generator: torch.Generator) -> Tensor:
    if has_hadamard(order):
        return hadamard(order) / order**0.5
    normal = torch.randn(order, order, dtype=torch.float64, generator=generator)
    orthogonal, upper = torch.linalg.qr(normal)
    return (orthogonal * upper.diagonal().sign()).float().contiguous()


def scaled(factors: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """The `factors` of ``diag(scale) R``, for a scale [K]; it costs nothing, because it is merged into the signs."""
    signs, *matrices = factors
    return [signs * scale.to(signs), *matrices]


def rotate(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``x R`` for the `factors` of R: [..., K] → [..., K].

    Differentiable; computed in float32 (float64 for float64 inputs), returned in the dtype of ``x``.
    """
    signs, *matrices = factors

    def rotated(rows: Tensor, signs: Tensor) -> Tensor:
        return _multiplied(rows * signs, matrices)

    if torch.is_grad_enabled() and x.requires_grad:
        return rotated(x, signs).to(x.dtype)
    return by_rows(rotated, x, (signs,), x.dtype)


def rotate_back(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``x Rᵀ``, the inverse of `rotate`."""
    signs, *matrices = factors
    return (_multiplied(widen(x), [matrix.t() for matrix in matrices]) * signs).to(x.dtype)


def _multiplied(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """``x`` times the Kronecker product of matrices."""
    product, after = x, x.shape[-1]
    for matrix in matrices:
        matrix, size, after = matrix.to(product.dtype), len(matrix), after // len(matrix)
        # One product if the axis is the last; otherwise one for each token and index of the axes before it. If there is
        # only one of these, a product of two matrices starts faster than a batch of one.
        if after == 1:
            product = product.reshape(-1, size) @ matrix
        else:
            product = matrix.t() @ product.reshape(-1, size, after).squeeze(0)
    return product.reshape(x.shape)
