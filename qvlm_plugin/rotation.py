"""Multiply channels by an orthogonal matrix: a `Rotation`, which spreads a few massive channels over all.

R = Q ⊗ H / √b, Q of order a and H the Sylvester-Hadamard matrix of order b, a power of two (QuaRot, Ashkboos et al.,
2024, for orders that are none). As H is a Kronecker product itself, R is one of small matrices, its factors: it takes a
product with each along an axis, K (a + 64 + …) multiplications for each token in place of K².
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qvlm_plugin.plan_header import Rotation
from qvlm_plugin.quantizers import widen

_LARGEST = 6
"""Largest factor of H, as a power of two. With 600 tokens of 4,096 channels, 64 x 64 takes 6 ms on one thread, 16 x 256
takes 10 (a product with a 4,096 x 4,096 weight: 127)."""


def factors(rotation: Rotation, device: torch.device | str = "cpu") -> list[Tensor]:
    """The orthogonal matrices, float32, whose Kronecker product is R, from left to right; none for a single channel.

    Q is drawn on the CPU: the orthogonal part of the QR decomposition, in float64, of a matrix of normal numbers from
    a generator with the rotation's seed; columns have the signs that make R's diagonal positive, for the decomposition
    to be unique. Rounded to float32 it is the same on every machine, but for a last digit here and there.
    """
    matrices = []
    if rotation.outer > 1:
        generator = torch.Generator().manual_seed(rotation.seed)
        normal = torch.randn(rotation.outer, rotation.outer, dtype=torch.float64, generator=generator)
        orthogonal, upper = torch.linalg.qr(normal)
        matrices.append((orthogonal * upper.diagonal().sign()).float().contiguous())
    power = rotation.block.bit_length() - 1
    count = -(-power // _LARGEST)
    matrices += [_hadamard((power + index) // count) for index in range(count)]
    return [matrix.to(device) for matrix in matrices]


def _hadamard(power: int) -> Tensor:
    """The symmetric, orthogonal Sylvester-Hadamard matrix of order 2^power: float32."""
    matrix = torch.ones(1, 1)
    for _ in range(power):
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / 2 ** (power / 2)


def rotate(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``x R`` for the Kronecker product R of ``factors``: [..., K] → [..., K].

    Differentiable; computed in float32 (float64 for such inputs), in the dtype of ``x``.
    """
    turned, after = widen(x), x.shape[-1]
    for factor in factors:
        factor, size, after = factor.to(turned.dtype), len(factor), after // len(factor)
        # As one product where the axis is the last, else as one for each token and index of the axes before.
        turned = turned.reshape(-1, size) @ factor if after == 1 else factor.t() @ turned.reshape(-1, size, after)
    return turned.reshape(x.shape).to(x.dtype)


def rotate_back(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``x Rᵀ``, the inverse of `rotate`."""
    return rotate(x, [factor.t() for factor in factors])
