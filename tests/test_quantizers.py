from contextlib import contextmanager
from functools import partial

import pytest
import torch
from accelerate import init_empty_weights
from stored_codes import other_integers, other_parameters, stored

from qvlm_plugin.formats import NF_BLOCK, NORMAL_REACH, WeightFormat
from qvlm_plugin.quantizers import (
    double_quantize,
    dynamic_codebook,
    fake_quantize,
    fake_quantize_straight_through,
    int_weight,
    normal_float_codebook,
    quantize_int,
    quantize_normal_float,
    shrink_range,
    stored_parameters,
    through_zero,
    token_range,
)

BITS = range(2, 9)


def int_format(bits, group_size, symmetric, **more):
    return WeightFormat(kind="int", bits=bits, group_size=group_size, symmetric=symmetric, **more)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_finds_the_nearest_of_all_points(bits):
    x = 3 * torch.randn(40, 6)
    lower, upper = x.amin(dim=0), x.amax(dim=0)
    points = torch.linspace(0, 1, 2**bits).outer(upper - lower) + lower  # [points, C]
    nearest = (x.unsqueeze(1) - points).abs().amin(dim=1)
    assert torch.allclose((fake_quantize(x, lower, upper, bits) - x).abs(), nearest, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_is_idempotent_and_stays_within_bounds(bits):
    x = 5 * torch.randn(100, 4)
    lower, upper = torch.full((4,), -1.0), torch.full((4,), 2.0)
    once = fake_quantize(x, lower, upper, bits)
    assert torch.allclose(fake_quantize(once, lower, upper, bits), once, atol=1e-6)
    assert once.min() >= -1 - 1e-6 and once.max() <= 2 + 1e-6
    assert len(once.unique()) <= 4 * 2**bits


def test_constant_and_dead_channels_are_exact():
    x = torch.tensor([[0.0, 7.3, -1e-30, 1.0], [0.0, 7.3, -1e-30, 2.0]])
    rounded = fake_quantize(x, x.amin(dim=0), x.amax(dim=0), 4)
    assert torch.equal(rounded[:, :3], x[:, :3])
    assert rounded.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    x = torch.tensor([[6e4, 1e-7, -6e4]], dtype=dtype).T.contiguous()
    rounded = fake_quantize(x, *token_range(x.T), 8)
    assert rounded.dtype == dtype and rounded.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_trainable_quantizer_gives_the_same_values(dtype):
    x = (3 * torch.randn(40, 6)).to(dtype)
    x[:, 0] = 2.0  # a constant channel
    for bits in BITS:
        for bounds in ((x.amin(dim=0) * 0.7, x.amax(dim=0) * 0.7), (x[:, 0], x[:, 0]), token_range(x, 0.8)):
            lower, upper = (bound if bound.shape != (40,) else bound[:6] for bound in bounds)
            assert torch.equal(
                fake_quantize_straight_through(x, lower, upper, bits), fake_quantize(x, lower, upper, bits)
            )


def test_gradients_pass_rounding_and_stop_at_the_bounds():
    x = torch.tensor([-5.0, -0.4, 0.3, 9.0, 0.0]).double().requires_grad_()
    lower, upper = (torch.tensor(bound, dtype=torch.float64, requires_grad=True) for bound in (-1.0, 1.0))
    fake_quantize_straight_through(x, lower, upper, 3).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1, 1, 0, 1]).double())
    # An element beyond a bound follows it. One inside moves by (rounded - exact) / levels as the step stretches.
    exact = (x.detach() + 1) / (2 / 7)
    inside = torch.tensor([1, 2, 4])
    stretch = ((exact.round() - exact) / 7)[inside].sum()
    assert torch.allclose(upper.grad, 1 + stretch) and torch.allclose(lower.grad, 1 - stretch)


def test_gradients_of_token_ranges_are_finite_even_for_constant_tokens():
    x = torch.cat([torch.ones(1, 4), torch.randn(2, 4)]).requires_grad_()
    ratio = torch.tensor([0.7], requires_grad=True)
    for reach in (None, NORMAL_REACH[2]):
        x.grad = ratio.grad = None
        fake_quantize_straight_through(x, *token_range(x, ratio, reach), 4).square().sum().backward()
        assert x.grad.isfinite().all() and ratio.grad.isfinite() and ratio.grad != 0


@pytest.mark.parametrize(("bits", "reach"), NORMAL_REACH.items())
def test_normal_tokens_are_rounded_with_the_least_error_at_their_reach(bits, reach):
    values = torch.distributions.Normal(0, 1).icdf((torch.arange(2**18) + 0.5) / 2**18)[None]  # evenly likely

    def error(factor):
        return float((fake_quantize(values, *token_range(values, factor, reach), bits) - values).square().mean())

    assert error(1) < min(error(0.97), error(1.03)) and error(1) < 0.95 * error(2)


def test_normal_bounds_lie_within_the_extremes_and_do_not_clip_a_token_of_two_values():
    x = torch.cat([torch.randn(4, 512), 300 * torch.randn(1, 512).sign()])
    extremes, bounds = token_range(x), token_range(x, reach=NORMAL_REACH[4])
    assert (bounds[0] >= extremes[0]).all() and (bounds[1] <= extremes[1]).all()
    assert (bounds[1][:4] < extremes[1][:4]).all() and torch.equal(bounds[1][4], extremes[1][4])
    moved = token_range(8 * x + 4, reach=NORMAL_REACH[4])
    assert torch.allclose(moved[1], 8 * bounds[1] + 4, rtol=1e-4)
    constant = torch.full((1, 7), 0.1)
    assert torch.allclose(fake_quantize(constant, *token_range(constant, reach=NORMAL_REACH[4]), 4), constant)


def test_rounding_a_channel_does_not_depend_on_its_offset():
    x = torch.randn(50, 3, dtype=torch.float64).float()
    plain = fake_quantize(x, x.amin(dim=0), x.amax(dim=0), 4)
    shifted = fake_quantize(x + 100, x.amin(dim=0) + 100, x.amax(dim=0) + 100, 4) - 100
    assert torch.allclose(plain, shifted, atol=1e-4)


def test_token_ranges_do_not_depend_on_the_batch():
    x = torch.randn(6, 5, 8)
    together = fake_quantize(x, *token_range(x, 0.9), 4)
    alone = torch.stack([fake_quantize(row, *token_range(row, 0.9), 4) for row in x])
    assert torch.equal(together, alone)


def test_shrinking_by_one_changes_nothing_and_less_lies_within():
    lower, center, upper = torch.tensor([-4.0, 1.0]), torch.tensor([0.5, 2.0]), torch.tensor([1.0, 2.5])
    assert all(
        torch.allclose(a, b) for a, b in zip(shrink_range(lower, upper, center, 1.0), (lower, upper), strict=True)
    )
    inner = shrink_range(lower, upper, center, 0.5)
    assert (inner[0] > lower).all() and (inner[1] < upper).all() and (inner[0] <= center).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 16, 24, 64, 1000])
@pytest.mark.parametrize("bits", BITS)
def test_integer_weights_err_at_most_half_a_step(bits, group_size, symmetric):
    weight = torch.randn(12, 64)
    quantized = quantize_int(weight, int_format(bits, group_size, symmetric))
    step = quantized.scale.repeat_interleave(quantized.group_size, dim=1)[:, :64]
    error = (quantized.dequantize() - weight).abs()
    # A fitted zero point is itself rounded, which may move the far end by another half step.
    assert (error <= step * (0.5 if symmetric else 1.0) + 1e-6).all()
    assert quantized.codes.int().max() < 2**bits and quantized.codes.dtype == torch.uint8


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_progressive_scales_are_multiples_whose_products_with_codes_fit_a_byte(bits, symmetric, dtype):
    weight = (torch.randn(12, 128) + torch.randn(12, 1) * (torch.rand(12, 1) > 0.5)).to(dtype)
    weight[:, :16] *= 30
    weight[0] = 0
    fmt = int_format(bits, 16, symmetric, progressive=True)
    quantized = quantize_int(weight, fmt)
    assert quantized.unit.shape == (12, 1) and quantized.unit.dtype == dtype and quantized.scale.dtype == torch.float32
    assert torch.equal(quantized.unit.float() * quantized.multiples, quantized.scale)
    zero_point = quantized.zero_point.int()
    products = quantized.multiples.int() * torch.maximum(zero_point, 2**bits - 1 - zero_point)
    assert products.max() <= 127 and quantized.multiples.min() >= 1
    assert (products[1:].amax(dim=1) > 127 - 2**bits).all()  # no unit is larger than it must be
    again = int_weight(weight, stored(fmt), stored_parameters(quantized, stored(fmt)))
    assert torch.equal(again.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("bits", [3, 4])
def test_progressive_scales_cost_little_where_groups_are_alike(bits):
    weight = torch.randn(64, 1024)
    free, progressive = (
        quantize_int(weight, int_format(bits, 64, False, progressive=flag)).dequantize() - weight
        for flag in (False, True)
    )
    assert progressive.square().mean() < 1.05 * free.square().mean()
    alone = quantize_int(weight, int_format(bits, None, False, progressive=True))  # one group: one multiple of it
    assert alone.multiples.unique().numel() <= 3


def test_clipping_narrows_the_range_and_one_changes_nothing():
    weight = torch.randn(6, 128)
    for symmetric in (False, True):
        plain = quantize_int(weight, int_format(4, 32, symmetric))
        assert torch.equal(plain.codes, quantize_int(weight, int_format(4, 32, symmetric), torch.ones(6, 4)).codes)
        halved = quantize_int(weight, int_format(4, 32, symmetric), torch.full((6, 4), 0.5))
        assert torch.allclose(halved.scale, plain.scale / 2)
        assert halved.dequantize().abs().max() < plain.dequantize().abs().max()
    weight[:, ::32] = -9 * weight.abs().amax()
    by_magnitude = quantize_int(weight, int_format(4, 32, False, clip_magnitude=True), torch.full((6, 4), 0.25))
    lowest = by_magnitude.dequantize().view(6, 4, 32).amin(dim=-1)
    highest = weight.view(6, 4, 32).amax(dim=-1)
    assert torch.allclose(lowest, weight.view(6, 4, 32).amin(dim=-1) / 4, rtol=0.1)
    assert (by_magnitude.dequantize().view(6, 4, 32).amax(dim=-1) - highest).abs().le(by_magnitude.scale).all()
    nf = quantize_normal_float(weight, 4, False, torch.full((12,), 0.5))
    assert torch.allclose(nf.absmax, quantize_normal_float(weight, 4, False).absmax / 2)


def test_groups_are_quantized_independently():
    weight = torch.randn(4, 50)
    whole = quantize_int(weight, int_format(4, 16, False)).dequantize()
    pieces = [quantize_int(piece, int_format(4, 16, False)).dequantize() for piece in weight.split(16, dim=1)]
    assert torch.equal(whole, torch.cat(pieces, dim=1))


def test_zero_is_exact_in_every_weight_format():
    weight = torch.randn(8, 128) * (torch.rand(8, 128) > 0.5)
    for symmetric in (False, True):
        assert (quantize_int(weight, int_format(4, 32, symmetric)).dequantize()[weight == 0] == 0).all()
    assert (quantize_normal_float(weight, 4, False).dequantize()[weight == 0] == 0).all()
    assert (quantize_int(torch.zeros(2, 8), int_format(3, None, False)).dequantize() == 0).all()
    assert (quantize_normal_float(torch.zeros(2, 8), 3, True).dequantize() == 0).all()


def test_candidate_bounds_of_a_large_tensor_are_computed_at_once():
    x = torch.randn(1, 4096, 130).expand(2, -1, -1)
    lower, upper = torch.tensor([-2.0, -1.0]), torch.tensor([1.5, 1.0]) * torch.linspace(0.5, 1, 130)[:, None]
    lower, upper = lower[:, None, None].expand(2, 1, 130), upper.T[:, None]
    both = fake_quantize(x, lower, upper, 4)
    for one, low, high in zip(both, lower, upper, strict=True):
        assert torch.equal(one, fake_quantize(x[0], low[0], high[0], 4))


@pytest.mark.parametrize("bits", BITS)
def test_codebook_is_ascending_spans_the_unit_interval_and_holds_zero(bits):
    codebook = normal_float_codebook(bits)
    assert len(codebook) == 2**bits
    assert (codebook.diff() > 0).all()
    assert codebook[0] == -1 and codebook[-1] == 1 and 0 in codebook


CODEBOOKS = [*(partial(normal_float_codebook, bits) for bits in (3, 4)), dynamic_codebook]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def forgotten():
    """No codebook was made yet, nor will be what a test made."""
    for function in (normal_float_codebook, dynamic_codebook):
        function.cache_clear()
    yield
    for function in (normal_float_codebook, dynamic_codebook):
        function.cache_clear()


@pytest.mark.parametrize(
    "context",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.device("meta"),
        lambda: default_dtype(torch.float16),
        lambda: init_empty_weights(include_buffers=True),
    ],
    ids=["inference", "no grad", "meta", "half", "accelerate"],
)
@pytest.mark.parametrize("make", CODEBOOKS, ids=["nf3", "nf4", "dynamic"])
def test_a_codebook_is_the_same_wherever_it_was_made_first(make, context, forgotten):
    expected = make().clone()
    for function in (normal_float_codebook, dynamic_codebook):
        function.cache_clear()
    with context():
        first = make()
    assert make() is first and torch.equal(first, expected) and first.dtype == torch.float32
    x = torch.ones(len(first), requires_grad=True)
    (x * first).sum().backward()  # which saves it for the backward pass
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("make", CODEBOOKS, ids=["nf3", "nf4", "dynamic"])
def test_there_is_a_codebook_for_each_device(make):
    meta = make(torch.device("meta"))
    assert meta.is_meta and make(torch.device("meta")) is meta
    assert not make().is_meta and make().shape == meta.shape


@pytest.mark.parametrize("double", [False, True])
def test_quantizing_and_dequantizing_leave_the_codebooks_as_they_are(double, forgotten):
    before = normal_float_codebook(4).clone(), dynamic_codebook().clone()
    quantize_normal_float(torch.randn(8, 128), 4, double).dequantize().zero_()
    assert torch.equal(before[0], normal_float_codebook(4)) and torch.equal(before[1], dynamic_codebook())


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_normal_float_picks_the_nearest_value_of_the_codebook(bits):
    weight = torch.randn(4, NF_BLOCK)
    codebook = normal_float_codebook(bits)
    unit = weight / weight.abs().amax(dim=1, keepdim=True)
    nearest = (unit.unsqueeze(-1) - codebook).abs().argmin(dim=-1)
    assert torch.equal(quantize_normal_float(weight, bits, False).codes.long(), nearest)


@pytest.mark.parametrize("shape", [(96, 576), (50, 100), (512, 1536)])
def test_nf4_agrees_with_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(normal_float_codebook(4), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_codebook(), functional.create_dynamic_map())
    weight = torch.randn(shape)
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    assert torch.equal(quantize_normal_float(weight, 4, False).dequantize(), theirs)

    state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)[1]
    their_scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    absmax = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(dim=1)
    scales = double_quantize(absmax).dequantize()
    differ = ~torch.isclose(scales, their_scales, atol=1e-5)
    # Where they differ, the scale lies midway between two codes and either is nearest, to rounding.
    assert differ.float().mean() < 0.005
    assert torch.allclose((scales - absmax).abs()[differ], (their_scales - absmax).abs()[differ], atol=1e-3)


def test_double_quantization_of_equal_scales_is_exact():
    assert torch.allclose(double_quantize(torch.full((700,), 0.3)).dequantize(), torch.full((700,), 0.3))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 8, 64])
def test_integers_are_the_plans_or_the_nearest(bits, symmetric, group_size):
    weight = torch.randn(3, 21)
    plain = WeightFormat(kind="int", bits=bits, group_size=group_size, symmetric=symmetric)
    found = int_weight(weight, plain, {})
    assert torch.equal(found.codes, quantize_int(weight, plain).codes)
    integers, parameters = other_integers(weight, plain), other_parameters(weight, plain)
    assert set(parameters) == set(stored(plain).parameters)
    again = int_weight(weight, stored(plain), parameters)
    assert again.group_size == integers.group_size and again.codes.shape == weight.shape
    for name in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(again, name), getattr(integers, name))
    assert not torch.equal(again.codes, found.codes)
    assert int_weight(weight.bfloat16(), stored(plain), parameters).scale.dtype == torch.bfloat16  # as files have them


def test_zero_becomes_a_point_and_bounds_move_by_half_a_step_at_most():
    torch.manual_seed(0)
    lower, upper = -torch.rand(500) * 10, torch.rand(500) * 3000
    lower[0], upper[0] = 2.0, 5.0
    for bits in (2, 4, 8):
        moved = through_zero(lower, upper, bits)
        step = (upper - lower) / (2**bits - 1)
        for before, after in zip((lower, upper), moved, strict=True):
            assert ((after - before).abs() <= step * 0.5001).all()
        inside = lower < 0
        assert (fake_quantize(torch.zeros(500), *moved, bits)[inside].abs() <= 1e-3 * step[inside]).all()
        assert moved[0][0] == 2 and moved[1][0] == 5
        again = through_zero(*moved, bits)
        assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(moved, again, strict=True))
