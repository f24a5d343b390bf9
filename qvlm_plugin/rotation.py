"""Multiply channels by an orthogonal matrix: a `Rotation`, which spreads a few massive channels over all.

R = S (M ⊗ H) with random signs S on the diagonal, an orthogonal M of a small order, and the Hadamard matrix H of a
power of two, divided by √order (QuaRot, Ashkboos et al., 2024). M is a Hadamard matrix, too, wherever Paley has one:
then all entries of R have one magnitude, and a channel that is alone in being massive becomes two values, which any
code of two bits or more can say. Signs keep the mean over channels, which is large behind a GELU, from becoming one
massive channel: unsigned, that is what the first column of H makes of it.

As H is a Kronecker product itself, R is one of small matrices, its factors: it takes a product with each along an axis,
K (outer + 64 + …) multiplications for each token in place of K².
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qvlm_plugin.hadamard import has_paley, paley, sylvester
from qvlm_plugin.plan_header import Rotation
from qvlm_plugin.quantizers import widen

_LARGEST = 6
"""Largest factor of H, as a power of two. With 600 tokens of 4,096 channels, 64 x 64 takes 6 ms on one thread, 16 x 256
takes 10 (a product with a 4,096 x 4,096 weight: 127)."""

_LARGEST_OUTER = 512
"""Of M, for a Hadamard matrix; an odd width that needs a larger one gets an M of its odd part."""


def rotation_of(site: str, channels: int, seed: int = 0) -> Rotation:
    """The rotation of so many channels: with the smallest M that is a Hadamard matrix, as 576 = 36 * 16 and
    11008 = 344 * 32; where there is none, with a random M of the order of the odd part, as 4304 = 269 * 16.
    """
    odd = channels // (channels & -channels)
    outer = odd
    while outer <= min(channels, _LARGEST_OUTER):
        if outer == 1 or has_paley(outer):
            return Rotation(site=site, outer=outer, block=channels // outer, seed=seed)
        outer *= 2
    return Rotation(site=site, outer=odd, block=channels // odd, seed=seed)


def factors(rotation: Rotation, device: torch.device | str = "cpu") -> list[Tensor]:
    """The signs [K], and the orthogonal matrices whose Kronecker product is M ⊗ H, from left to right: float32.

    Signs and a random M are drawn on the CPU from a generator with the rotation's seed. M is the orthogonal part of the
    QR decomposition, in float64, of a matrix of normal numbers, with columns of the signs that make the diagonal of the
    other part positive, for the decomposition to be unique. Rounded to float32 it is the same on every machine, but for
    a last digit here and there.
    """
    generator = torch.Generator().manual_seed(rotation.seed)
    signs = 1.0 - 2.0 * torch.randint(2, (rotation.channels,), generator=generator)
    found = [signs]
    if rotation.outer > 1:
        found.append(_outer(rotation.outer, generator))
    power = rotation.block.bit_length() - 1
    count = -(-power // _LARGEST)
    powers = [(power + index) // count for index in range(count)]
    found += [sylvester(power) / 2 ** (power / 2) for power in powers]
    return [factor.to(device) for factor in found]


def _outer(order: int, generator: torch.Generator) -> Tensor:
    if has_paley(order):
        return paley(order) / order**0.5
    normal = torch.randn(order, order, dtype=torch.float64, generator=generator)
    orthogonal, upper = torch.linalg.qr(normal)
    return (orthogonal * upper.diagonal().sign()).float().contiguous()


def scaled(factors: Sequence[Tensor], scale: Tensor) -> list[Tensor]:
    """The `factors` of ``diag(scale) R``, for a scale [K]: inputs that are divided by it before they are rotated cost
    nothing more, since the signs multiply them anyway."""
    signs, *matrices = factors
    return [signs * scale.to(signs), *matrices]


def rotate(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``x R`` for the `factors` of R: [..., K] → [..., K].

    Differentiable; computed in float32 (float64 for such inputs), in the dtype of ``x``.
    """
    signs, *matrices = factors
    return _multiplied(x * signs, matrices).to(x.dtype)  # float32 signs widen it


def rotate_back(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``x Rᵀ``, the inverse of `rotate`."""
    signs, *matrices = factors
    return (_multiplied(widen(x), [matrix.t() for matrix in matrices]) * signs).to(x.dtype)


def _multiplied(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """``x`` times the Kronecker product of matrices."""
    turned, after = x, x.shape[-1]
    for matrix in matrices:
        matrix, size, after = matrix.to(turned.dtype), len(matrix), after // len(matrix)
        # As one product where the axis is the last, else as one for each token and index of the axes before.
        turned = turned.reshape(-1, size) @ matrix if after == 1 else matrix.t() @ turned.reshape(-1, size, after)
    return turned.reshape(x.shape)
