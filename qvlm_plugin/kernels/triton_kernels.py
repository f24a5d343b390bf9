"""Kernels of `fused`; importing this needs Triton.

To round a value to a whole number, a large number is added and subtracted again; at its size float32 has only whole
numbers. This rounds to nearest, ties to even, as torch does.
"""

import triton
import triton.language as tl

_LARGE = tl.constexpr(12582912.0)
"""1.5 times 2^23."""


@triton.jit
def round_tokens(
    x, clip_ratio, center, out, steps, offsets, columns, levels, reach,
    CENTERED: tl.constexpr, NORMAL: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Round one token to ``levels + 1`` points of its own range, or to their codes, see `fused`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < columns
    values = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        middle = tl.load(center + column, mask=inside, other=0.0).to(tl.float32)
        values = values - middle
    mean = tl.sum(values, axis=0) / columns  # values outside are 0
    clip = tl.load(clip_ratio).to(tl.float32)
    lower = tl.min(tl.where(inside, values, float("inf")), axis=0)
    upper = tl.max(tl.where(inside, values, float("-inf")), axis=0)
    if NORMAL:
        distances = tl.where(inside, values - mean, 0.0)
        distance = tl.sqrt(tl.sum(distances * distances, axis=0) / columns) * (reach * clip)
        lower = tl.maximum(lower, mean - distance, propagate_nan=tl.PropagateNan.ALL)
        upper = tl.minimum(upper, mean + distance, propagate_nan=tl.PropagateNan.ALL)
    else:
        lower = mean + (lower - mean) * clip
        upper = mean + (upper - mean) * clip
    step = (upper - lower) / levels
    inverse = tl.where(step > 0, 1.0 / step, 0.0)
    code = tl.minimum(tl.maximum((values - lower) * inverse, 0.0), levels)
    code = (code + _LARGE) - _LARGE
    if CODES:
        half = (levels + 1) // 2
        tl.store(out + row * columns + column, (code - half).to(tl.int8), mask=inside)
        tl.store(steps + row, step)
        tl.store(offsets + row, lower + half * step)
    else:
        point = code * step + lower
        if CENTERED:
            point = point + middle
        tl.store(out + row * columns + column, point.to(out.dtype.element_ty), mask=inside)


@triton.jit
def round_channels(
    x, lower, factor, inverse, index, out, columns, width, levels, CODES: tl.constexpr, BLOCK: tl.constexpr
):
    """Round channels of one token within fixed bounds: to points, with ``factor`` as their steps; or to codes of the
    channels at ``index``, with ``factor`` added to the codes."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    channel = column
    if CODES:
        channel = tl.load(index + column, mask=inside, other=0)
    value = tl.load(x + row * columns + channel, mask=inside, other=0.0).to(tl.float32)
    low = tl.load(lower + channel, mask=inside, other=0.0)
    code = (value - low) * tl.load(inverse + channel, mask=inside, other=0.0)
    code = tl.minimum(tl.maximum(code, 0.0), levels)
    code = (code + _LARGE) - _LARGE
    by = tl.load(factor + channel, mask=inside, other=0.0)
    result = code + by if CODES else code * by + low
    result = tl.where(value == value, result, value)  # NaN stays NaN
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def multiply_codes(
    codes, first, second, scale, step, offset, row_sum, bias, out, tokens, features, width_1, width_2,
    SEGMENTS: tl.constexpr, STEPS: tl.constexpr, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Multiply codes of up to ``TOKENS`` tokens by ``FEATURES`` rows of one or two segments of a weight, see
    `int8_product.int8_linear`."""
    token = tl.arange(0, TOKENS)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    is_token, is_feature = token < tokens, feature < features
    row = feature.to(tl.int64)
    total = tl.zeros([TOKENS, FEATURES], dtype=tl.float32)
    for segment in tl.static_range(SEGMENTS):
        weight = first if segment == 0 else second
        width = width_1 if segment == 0 else width_2
        start = 0 if segment == 0 else width_1
        sums = tl.zeros([TOKENS, FEATURES], dtype=tl.int32)
        for begin in range(0, width, WIDTH):
            channel = begin + tl.arange(0, WIDTH)
            is_channel = channel < width
            x = tl.load(
                codes + token[:, None] * (width_1 + width_2) + start + channel[None, :],
                mask=is_token[:, None] & is_channel[None, :], other=0,
            )  # fmt: skip
            w = tl.load(
                weight + row[None, :] * width + channel[:, None],
                mask=is_feature[None, :] & is_channel[:, None], other=0,
            )  # fmt: skip
            sums += tl.dot(x, w, out_dtype=tl.int32)
        total += (
            sums.to(tl.float32) * tl.load(scale + segment * features + feature, mask=is_feature, other=0.0)[None, :]
        )
    if STEPS:
        total = total * tl.load(step + token, mask=is_token, other=0.0)[:, None]
        sum_of_row = tl.load(row_sum + feature, mask=is_feature, other=0.0)
        total += tl.load(offset + token, mask=is_token, other=0.0)[:, None] * sum_of_row[None, :]
    if BIAS:
        total += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    places = token[:, None].to(tl.int64) * features + feature[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=is_token[:, None] & is_feature[None, :])


@triton.jit
def scale_product(product, scale, step, offset, row_sum, bias, out, features, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Turn a part of a token's product of codes into the product of the values that the codes represent."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    value = tl.load(product + row * features + feature, mask=inside, other=0).to(tl.float32)
    value = value * tl.load(scale + feature, mask=inside, other=0.0) * tl.load(step + row)
    value += tl.load(offset + row) * tl.load(row_sum + feature, mask=inside, other=0.0)
    if BIAS:
        value += tl.load(bias + feature, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * features + feature, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_tokens(
    x, signs, first, second, third, out, order,
    PADDED: tl.constexpr, MIDDLE: tl.constexpr, LAST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Multiply one token by the Kronecker product of three matrices, of ``order``, ``MIDDLE`` and ``LAST``, or of the
    first and the last if ``MIDDLE`` is 1; see `rotation.rotate`."""
    rest: tl.constexpr = MIDDLE * LAST
    row = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, PADDED), tl.arange(0, rest)
    rotated = tl.zeros([PADDED, rest], dtype=tl.float32)
    for begin in range(0, order, CHUNK):
        k = begin + tl.arange(0, CHUNK)
        inside = k < order
        places = k[:, None] * rest + j[None, :]
        values = tl.load(x + row * order * rest + places, mask=inside[:, None], other=0.0).to(tl.float32)
        values = values * tl.load(signs + places, mask=inside[:, None], other=0.0)
        matrix = tl.load(
            first + k[None, :] * order + i[:, None], mask=inside[None, :] & (i < order)[:, None], other=0.0
        )
        rotated += tl.dot(matrix, values, input_precision="tf32x3")
    rotated = _multiplied(tl.reshape(rotated, [PADDED * MIDDLE, LAST]), third, PADDED * MIDDLE, LAST, CHUNK)
    if MIDDLE > 1:
        rotated = tl.permute(tl.reshape(rotated, [PADDED, MIDDLE, LAST]), [0, 2, 1])
        rotated = _multiplied(tl.reshape(rotated, [PADDED * LAST, MIDDLE]), second, PADDED * LAST, MIDDLE, CHUNK)
        rotated = tl.permute(tl.reshape(rotated, [PADDED, LAST, MIDDLE]), [0, 2, 1])
    rotated = tl.reshape(rotated, [PADDED, rest])
    places = i[:, None] * rest + j[None, :]
    tl.store(out + row * order * rest + places, rotated.to(out.dtype.element_ty), mask=(i < order)[:, None])


@triton.jit
def _multiplied(rows, matrix, COUNT: tl.constexpr, ORDER: tl.constexpr, SMALLEST: tl.constexpr):
    """``rows`` [COUNT, ORDER] times a matrix. Products have a minimum size, so for a smaller matrix several rows are
    put side by side and multiplied by a block-diagonal matrix of as many copies."""
    WIDTH: tl.constexpr = max(ORDER, SMALLEST)
    k, n = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    values = tl.load(matrix + k % ORDER * ORDER + n % ORDER)
    if ORDER < SMALLEST:
        values = tl.where(k // ORDER == n // ORDER, values, 0.0)
    rows = tl.reshape(rows, [COUNT * ORDER // WIDTH, WIDTH])
    return tl.reshape(tl.dot(rows, values, input_precision="tf32x3"), [COUNT, ORDER])
