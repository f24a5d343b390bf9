"""Functions that take one launch on CUDA, where torch's operators take five to twenty.

For small batches, launching so many kernels takes longer than reading the weights. These kernels are written in Triton
(`triton_kernels`), which comes with torch for CUDA, and compute in float32 the same as the functions that they replace.
`fusable` decides when they are used. They are not used under torch.compile, which fuses operators itself.
"""

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from qvlm_plugin.formats import ActivationFormat


def points_of_tokens(
    x: Tensor, clip_ratio: Tensor, center: Tensor | None, activation_format: ActivationFormat
) -> Tensor:
    """`reference.round_activation` of tokens: ``x`` [..., I] → the same shape and dtype."""
    points = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_tokens(x, clip_ratio, center, activation_format, (points,))
    return points


def codes_of_tokens(
    x: Tensor, clip_ratio: Tensor, center: Tensor | None, activation_format: ActivationFormat
) -> tuple[Tensor, Tensor, Tensor]:
    """Signed codes of ``x`` [..., I], int8 [N, I], and each token's ``step`` and ``offset``, float32 [N, 1]: the token,
    minus ``center`` if there is one, is rounded to ``offset + step * code``."""
    columns = x.shape[-1]
    codes = x.new_empty(x.numel() // columns, columns, dtype=torch.int8)
    step, offset = (x.new_empty(len(codes), 1, dtype=torch.float32) for _ in range(2))
    _launch_tokens(x, clip_ratio, center, activation_format, (codes, step, offset))
    return codes, step, offset


def points_of_channels(x: Tensor, lower: Tensor, step: Tensor, inverse: Tensor, bits: int) -> Tensor:
    """`quantizers.round_to_points` for bounds of channels, float32 [I]."""
    points = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_channels(x, (lower, step, inverse), None, bits, points)
    return points


def codes_of_channels(
    x: Tensor, bounds: tuple[Tensor, Tensor, Tensor], index: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """The codes of ``x`` [..., I] at ``index`` [C], in ``dtype`` [N, C]; in floating-point dtypes NaN stays NaN.

    Args:
        x: inputs.
        bounds: ``lower``, ``inverse``, and ``low``, which is added to the codes; float32 [I].
        index: int64 [C].
        bits: bits of a code.
        dtype: dtype of the result.
    """
    lower, inverse, low = bounds
    codes = x.new_empty(x.numel() // x.shape[-1], len(index), dtype=dtype)
    _launch_channels(x, (lower, low, inverse), index, bits, codes)
    return codes


def _launch_tokens(
    x: Tensor,
    clip_ratio: Tensor,
    center: Tensor | None,
    activation_format: ActivationFormat,
    outputs: tuple[Tensor] | tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the points, or codes, steps and offsets."""
    x, columns, coded = x.contiguous(), x.shape[-1], len(outputs) == 3
    if not x.numel():
        return
    width, reach = _power(columns), activation_format.reach
    with torch.cuda.device(x.device):  # Triton starts kernels on the current device
        _kernels().round_tokens[(x.numel() // columns,)](
            x, clip_ratio, x if center is None else center, *(outputs if coded else outputs * 3), columns,
            2**activation_format.bits - 1, reach or 0.0, center is not None, reach is not None, coded, width,
            num_warps=4 if width <= 4096 else 8,
        )  # fmt: skip


def _launch_channels(
    x: Tensor, bounds: tuple[Tensor, Tensor, Tensor], index: Tensor | None, bits: int, out: Tensor
) -> None:
    x, columns, width = x.contiguous(), x.shape[-1], out.shape[-1]
    if not out.numel():
        return
    with torch.cuda.device(x.device):
        _kernels().round_channels[(out.numel() // width, -(-width // _BLOCK))](
            x, *bounds, x if index is None else index, out, columns, width, 2**bits - 1,
            index is not None, _BLOCK,
        )  # fmt: skip


_BLOCK = 1024
"""Channels of a token that one program computes."""


FEW_TOKENS = 16
"""Maximum number of tokens of `multiply_codes`: the rows of a tensor core's tile."""


def multiply_codes(
    codes: Tensor,
    weights: Sequence[Tensor],
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    steps: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """`int8_product.int8_linear` of up to `FEW_TOKENS` tokens, for one or two segments.

    Args:
        codes: int8 [N, I].
        weights: weights of the segments, int8 [O, channels of the segment].
        scale: float32 [segments, O].
        bias: [O] or None.
        dtype: dtype of the result.
        steps: ``step``, ``offset`` and ``row_sum``; None for tokens that equal their codes.
    """
    codes, out = codes.contiguous(), codes.new_empty(len(codes), scale.shape[1], dtype=dtype)
    first, *second = weights
    step, offset, row_sum = (scale, scale, scale) if steps is None else steps
    if out.numel():
        with torch.cuda.device(codes.device):
            _kernels().multiply_codes[(-(-scale.shape[1] // _FEATURES),)](
                codes, first, weights[-1], scale, step, offset, row_sum, scale if bias is None else bias, out,
                len(codes), scale.shape[1], first.shape[1], second[0].shape[1] if second else 0,
                len(weights), steps is not None, bias is not None, FEW_TOKENS, _FEATURES, _CHANNELS,
            )  # fmt: skip
    return out


_FEATURES, _CHANNELS = 16, 256
"""Rows and columns of a weight that a program multiplies at a time."""


def scale_product(
    product: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    steps: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """`int8_product.scaled` of a ``product`` of codes: [N, O] in ``dtype``.

    Args:
        product: [N, O].
        scale: float32 [O].
        bias: [O] or None.
        dtype: dtype of the result.
        steps: ``step`` and ``offset``, float32 [N, 1], and ``row_sum``, float32 [O].
    """
    product, out = product.contiguous(), torch.empty_like(product, dtype=dtype)
    count, features = product.shape
    if out.numel():
        with torch.cuda.device(product.device):
            _kernels().scale_product[(count, -(-features // _BLOCK))](
                product, scale, *steps, scale if bias is None else bias, out, features, bias is not None, _BLOCK,
            )  # fmt: skip
    return out


def can_rotate(orders: tuple[int, ...]) -> bool:
    """Whether `rotate` supports matrices of these orders: two or three, of which all but the first are powers of two.

    A program keeps a whole token in registers, with the first order padded to a power of two: 16,384 channels at most.
    For example, 18,944 channels (148 × 128) are padded to 32,768, which is too many.
    """
    if len(orders) not in (2, 3):
        return False
    first, *others = orders
    rest = math.prod(others)
    small_enough = first <= _LARGEST_ORDER and max(_DOT, _power(first)) * rest <= _LARGEST_TOKEN
    return small_enough and rest >= _DOT and all(order == _power(order) for order in others)


_LARGEST_ORDER, _LARGEST_TOKEN = 512, 2**14
"""The largest order of the first matrix, and the most channels of a token."""

_DOT = 16
"""The smallest size of Triton's products."""


def rotate(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """`rotation.rotate` for matrices of orders that `can_rotate` allows."""
    signs, first, *others = factors
    x, order, channels = x.contiguous(), len(first), len(signs)
    out = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device(x.device):
            _kernels().rotate_tokens[(x.numel() // channels,)](
                x, signs, first, others[0], others[-1], out, order, max(_DOT, _power(order)),
                len(others[0]) if len(others) > 1 else 1, len(others[-1]), _DOT, num_warps=8,
            )  # fmt: skip
    return out


def _power(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton is installed and the device has compute capability 8.0 or more, as the kernels need."""
    return _kernels() is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _kernels() -> ModuleType | None:
    """The module of the kernels; None without Triton."""
    try:
        return import_module("qvlm_plugin.kernels.triton_kernels")
    except ImportError:
        return None
