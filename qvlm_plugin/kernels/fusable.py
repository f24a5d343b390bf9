"""When to use the functions of `fused`: on CUDA with Triton, without gradients or torch.compile, if they pass a test.

Each function is compared with torch's operators at its first use with a device, dtype and size, since a kernel may work
for some of these only. If it fails, torch's operators are used instead, and one warning is logged.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from qvlm_plugin.formats import ActivationFormat
from qvlm_plugin.kernels import fused
from qvlm_plugin.quantizers import fake_quantize, quantization_step, round_to_codes, round_to_points, token_range
from qvlm_plugin.rotation import rotate

logger = logging.getLogger(__name__)

_TOLERANCE = 0.01
"""Largest relative error: at a tie a code may be rounded to the other side."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Results = Iterator[tuple[Tensor, Tensor]]
"""Pairs of a function's result and the expected result."""


def tokens(x: Tensor, normal: bool = False) -> bool:
    """Whether to use `fused.points_of_tokens` and `fused.codes_of_tokens` for inputs like ``x`` [..., I].

    Kernels for `ActivationFormat.normal` bounds are compiled separately, so only those that are asked for are tested.
    """
    return _may_use(x) and _passes(_tokens, x.device, x.dtype, x.shape[-1], *(["normal"] if normal else []))


def channels(x: Tensor) -> bool:
    """Whether to use `fused.points_of_channels` and `fused.codes_of_channels` for inputs like ``x`` [..., I]."""
    return _may_use(x) and _passes(_channels, x.device, x.dtype, x.shape[-1])


def products(codes: Tensor, dtype: torch.dtype, segments: int) -> bool:
    """Whether to use `fused.multiply_codes` for ``codes`` [N, I], this number of segments, and results in ``dtype``."""
    if not _may_use(codes, dtype) or len(codes) > fused.FEW_TOKENS or segments > 2:
        return False
    return _passes(_products, codes.device, dtype, segments)


def scaling(product: Tensor, dtype: torch.dtype) -> bool:
    """Whether to use `fused.scale_product` for a ``product`` of codes [N, O] and results in ``dtype``."""
    return _may_use(product, dtype) and _passes(_scaling, product.device, dtype, product.dtype)


def rotations(x: Tensor, factors: Sequence[Tensor]) -> bool:
    """Whether to use `fused.rotate` for inputs like ``x`` [..., I] and these `rotation.factors`."""
    if not _may_use(x):
        return False
    orders = tuple(len(matrix) for matrix in factors[1:])
    return fused.can_rotate(orders) and _passes(_rotations, x.device, x.dtype, orders)


def _may_use(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    if x.device.type != "cuda" or torch.compiler.is_compiling() or (dtype or x.dtype) not in _DTYPES:
        return False
    return not (torch.is_grad_enabled() and x.requires_grad) and fused.has_kernels(x.device)


@cache
def _passes(test: Callable[..., Results], device: torch.device, dtype: torch.dtype, *sizes: object) -> bool:
    failure = _failure(test, device, dtype, *sizes)
    if failure:
        problem = ", ".join(map(str, (dtype, *sizes)))
        name = test.__name__.strip("_")
        logger.warning("torch's operators replace a Triton kernel (%s: %s) on %s: %s", name, problem, device, failure)
    return failure is None


@torch.no_grad()
def _failure(test: Callable[..., Results], device: torch.device, dtype: torch.dtype, *sizes: object) -> str | None:
    """Why a test fails, in a few words; None if it passes."""
    try:
        for result, expected in test(device, dtype, *sizes):
            result, expected = result.double(), expected.double()
            error = float((result - expected).norm() / expected.norm())
            if not error <= _TOLERANCE:
                return f"its relative error is {error:.2g}"
    except Exception as error:  # a compiler may fail in any way
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _tokens(device: torch.device, dtype: torch.dtype, width: int, bounds: str = "extremes") -> Results:
    x, center = _normal(3, width).to(device, dtype), _normal(width).flip(0).to(device)
    ratio = torch.full((1,), 0.75, device=device)
    for bits in (4, 8):
        fmt = ActivationFormat(kind="dynamic_token", bits=bits, normal=bounds == "normal")
        yield fused.points_of_tokens(x, ratio, None, fmt), fake_quantize(x, *token_range(x, ratio, fmt.reach), bits)
        distance = x.float() - center
        lower, upper = token_range(distance, ratio, fmt.reach)
        step, inverse = quantization_step(lower, upper, bits)
        codes, found_step, offset = fused.codes_of_tokens(x, ratio, center, fmt)
        expected = round_to_codes(distance, lower, inverse, bits) * step + lower
        yield codes * found_step + offset, expected
        yield codes, (expected - lower) / step - 2 ** (bits - 1)


def _channels(device: torch.device, dtype: torch.dtype, width: int) -> Results:
    x, lower = _normal(3, width).to(device, dtype), -_normal(width).flip(0).abs().to(device)
    low, index = lower.round(), torch.arange(width, device=device).flip(0)
    step, inverse = quantization_step(lower, lower + 2, 4)
    yield fused.points_of_channels(x, lower, step, inverse, 4), round_to_points(x, lower, step, inverse, 4)
    codes = fused.codes_of_channels(x, (lower, inverse, low), index, 4, torch.int8)
    yield codes, (round_to_codes(x.float(), lower, inverse, 4) + low)[:, index]


def _products(device: torch.device, dtype: torch.dtype, segments: int) -> Results:
    codes = (20 * _normal(3, 300 * segments)).to(device, torch.int8)
    weights = [(20 * _normal(70, 300)).roll(part).to(device, torch.int8) for part in range(segments)]
    scale, bias = _normal(segments, 70).to(device) / 100, _normal(70).to(device)
    step, offset, row_sum = _normal(3, 1).to(device), _normal(3, 1).to(device), 10 * bias
    parts = zip(codes.double().chunk(segments, dim=1), weights, scale.double(), strict=True)
    total = sum(part @ weight.double().t() * of_weight for part, weight, of_weight in parts)
    yield fused.multiply_codes(codes, weights, scale, bias, dtype, None), total + bias
    steps = step, offset, row_sum
    yield fused.multiply_codes(codes, weights, scale, None, dtype, steps), total * step + offset * row_sum


def _scaling(device: torch.device, dtype: torch.dtype, of_product: torch.dtype) -> Results:
    product = (100 * _normal(3, 300)).to(device, of_product)
    scale, row_sum, bias = (_normal(300).roll(shift).to(device) for shift in range(3))
    step, offset = _normal(3, 1).to(device), _normal(3, 1).to(device) + 1
    expected = product * scale.double() * step + offset * row_sum
    yield fused.scale_product(product, scale, None, dtype, (step, offset, row_sum)), expected
    yield fused.scale_product(product, scale, bias.to(dtype), dtype, (step, offset, row_sum)), expected + bias


def _rotations(device: torch.device, dtype: torch.dtype, orders: tuple[int, ...]) -> Results:
    channels = torch.Size(orders).numel()
    factors = [_normal(channels).sign().to(device), *(_normal(order, order).to(device) for order in orders)]
    x = _normal(3, channels).to(device, dtype)
    yield fused.rotate(x, factors), rotate(x, factors)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
