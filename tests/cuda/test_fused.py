"""What takes one launch: what it computes in Triton's interpreter, and that Triton compiles it."""

import inspect

import pytest
import torch
import triton
from kernel_problems import relative
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qvlm_plugin import rotation
from qvlm_plugin.formats import ActivationFormat
from qvlm_plugin.kernels import fused, triton_kernels
from qvlm_plugin.kernels.int8_product import int8_linear
from qvlm_plugin.kernels.reference import round_activation
from qvlm_plugin.quantizers import quantization_step, round_to_codes, round_to_points, token_range

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def inputs(dtype, tokens=3, columns=200):
    torch.manual_seed(0)
    x = torch.randn(tokens, columns) * (0.5 * torch.randn(columns)).exp() + 0.2
    return x.to(dtype), torch.tensor([0.9]), torch.randn(columns) / 4


def on_gpu(*values):
    return [None if value is None else value.to("cuda:0") for value in values]


def close(values, expected, step):
    """Equal but for ties, which fall to either side: a step at most, and seldom."""
    distance = (values.cpu().float() - expected.float()).abs() / step
    assert distance.max() < 1.02 and (distance > 0.02).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("normal", [False, True])
def test_points_of_tokens(triton_cuda, dtype, bits, centered, normal):
    x, ratio, center = inputs(dtype)
    fmt = ActivationFormat(kind="dynamic_token", bits=bits, centered=centered, normal=normal)
    expected = round_activation(x, fmt, {"clip_ratio": ratio, "center": center})
    arguments = on_gpu(x, ratio, center if centered else None)
    with triton_cuda.counting():
        points = fused.points_of_tokens(*arguments, fmt)
    assert triton_cuda.launches.total() == 1 and points.dtype == dtype
    lower, upper = token_range(x.float() - (center if centered else 0), ratio, fmt.reach)
    close(points, expected, (upper - lower) / (2**bits - 1) + 0.01 * x.float().abs())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("normal", [False, True])
def test_codes_of_tokens(triton_cuda, bits, centered, normal):
    x, ratio, center = inputs(torch.bfloat16)
    fmt = ActivationFormat(kind="dynamic_token", bits=bits, centered=centered, normal=normal)
    codes, step, offset = fused.codes_of_tokens(*on_gpu(x.view(1, 3, -1), ratio, center if centered else None), fmt)
    distance = x.float() - (center if centered else 0)
    lower, upper = token_range(distance, ratio, fmt.reach)
    right_step, inverse = quantization_step(lower, upper, bits)
    assert codes.dtype == torch.int8 and codes.shape == (3, 200) and step.shape == offset.shape == (3, 1)
    torch.testing.assert_close(step.cpu(), right_step)
    torch.testing.assert_close(offset.cpu(), lower + 2 ** (bits - 1) * right_step)
    close(codes, round_to_codes(distance, lower, inverse, bits) - 2 ** (bits - 1), 1)


@pytest.mark.parametrize(("dtype", "columns"), zip(DTYPES, [200, 1024, 1100], strict=True))
def test_channels_to_the_bit(triton_cuda, dtype, columns):
    x, _, _ = inputs(dtype, 2, columns)
    lower = -torch.rand(columns)
    step, inverse = quantization_step(lower, lower + torch.rand(columns).sub(0.1).clamp_min(0), 4)
    with triton_cuda.counting():
        points = fused.points_of_channels(*on_gpu(x, lower, step, inverse), 4)
    assert torch.equal(points.cpu(), round_to_points(x, lower, step, inverse, 4))
    assert triton_cuda.launches.total() == 1
    index, low = torch.randperm(columns)[: columns // 2], torch.arange(columns).float() % 7 - 3
    right = (round_to_codes(x, lower, inverse, 4) + low)[:, index]
    for kind in (torch.int8, torch.bfloat16):
        codes = fused.codes_of_channels(*on_gpu(x), on_gpu(lower, inverse, low), *on_gpu(index), 4, kind)
        assert codes.dtype == kind and torch.equal(codes.cpu(), right.to(kind))


@pytest.mark.parametrize("normal", [False, True])
def test_constant_tokens_and_what_is_not_a_number(triton_cuda, normal):
    fmt = ActivationFormat(kind="dynamic_token", bits=4, normal=normal)
    x = torch.tensor([[2.0, 2.0, 2.0], [1.0, torch.nan, 3.0], [1.0, 2.0, 3.0], [torch.inf, 0.0, 1.0]], device="cuda:0")
    points = fused.points_of_tokens(x, torch.ones(1, device="cuda:0"), None, fmt).cpu()
    assert points[0].tolist() == [2, 2, 2] and points[1].isnan().all() and points[3].isnan().all()
    torch.testing.assert_close(points[2], torch.tensor([1.0, 2.0, 3.0]), rtol=0.04, atol=0)
    lower, step = torch.zeros(3, device="cuda:0"), torch.ones(3, device="cuda:0")
    points = fused.points_of_channels(x, lower, step, step, 4).cpu()
    assert points[1, 1].isnan() and points[1, [0, 2]].tolist() == [1, 3] and points[3, 0] == 15


@pytest.mark.parametrize("widths", [(40,), (300,), (264, 8)], ids=str)
@pytest.mark.parametrize(("tokens", "dtype"), zip([1, 5, 16], DTYPES, strict=True))
def test_products_of_codes(triton_cuda, tokens, widths, dtype):
    torch.manual_seed(tokens)
    codes = torch.randint(-128, 128, (tokens, sum(widths)), dtype=torch.int8)
    weights = [torch.randint(-128, 128, (24, width), dtype=torch.int8) for width in widths]
    scale, row_sum, bias = torch.rand(len(widths), 24) / 1e3, torch.randn(24), torch.randn(24).to(dtype)
    step, offset = torch.rand(tokens, 1), torch.randn(tokens, 1)
    for steps, added in ((None, None), (None, bias), ((step, offset, row_sum), bias)):
        expected = int8_linear(codes, weights, scale, added, torch.float32, *(steps or ()))
        with triton_cuda.counting():
            product = fused.multiply_codes(
                *on_gpu(codes), on_gpu(*weights), *on_gpu(scale, added), dtype, steps and on_gpu(*steps)
            )
        assert triton_cuda.launches.total() == 1
        assert product.dtype == dtype and relative(product.cpu(), expected) < CLOSE[dtype]


@pytest.mark.parametrize(
    ("of_product", "dtype"), [(torch.int32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.int32, torch.half)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_products(triton_cuda, bias, dtype, of_product):
    torch.manual_seed(0)
    product, scale = torch.randint(-9999, 9999, (3, 1100)).to(of_product), torch.rand(1100)
    step, offset, row_sum, added = torch.rand(3, 1), torch.randn(3, 1), torch.randn(1100), torch.randn(1100).to(dtype)
    expected = product * scale * step + offset * row_sum + (added.float() if bias else 0)
    operands, steps = on_gpu(product, scale, added if bias else None), on_gpu(step, offset, row_sum)
    with triton_cuda.counting():
        result = fused.scale_product(*operands, dtype, steps)
    assert triton_cuda.launches.total() == 1
    assert result.dtype == dtype and relative(result.cpu(), expected) < CLOSE[dtype]


@pytest.mark.parametrize(
    ("channels", "dtype"), [(256, torch.float32), (576, torch.bfloat16), (1536, torch.float32), (4096, torch.float16)]
)
def test_rotations(triton_cuda, channels, dtype):
    factors = rotation.factors(rotation.rotation_of("site", channels))
    factors = rotation.scaled(factors, 0.5 + torch.rand(channels))
    x = torch.randn(1, 2, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert fused.can_rotate(tuple(map(len, factors[1:])))
    rotated = fused.rotate(*on_gpu(x), on_gpu(*factors))
    assert rotated.dtype == dtype and rotated.shape == x.shape
    assert relative(rotated.cpu(), rotation.rotate(x.float(), factors)) < CLOSE[dtype]


def test_which_rotations_a_program_holds():
    for width in (576, 1024, 1536, 2560, 4096, 5120, 5632, 11008, 13824, 14336):
        matrices = rotation.factors(rotation.rotation_of("site", width))[1:]
        assert fused.can_rotate(tuple(map(len, matrices))), width
    for orders in ((64,), (16, 8), (108, 12, 16), (4, 64, 64, 64), (1024, 16), (32, 32, 32), (148, 8, 16)):
        assert not fused.can_rotate(orders)


KINDS = {
    "x": "*bf16", "codes": "*i8", "first": "*fp32", "product": "*i32", "index": "*i64", "columns": "i32",
    "width": "i32", "levels": "i32", "tokens": "i32", "features": "i32", "width_1": "i32", "width_2": "i32",
    "order": "i32", "reach": "fp32",
}  # fmt: skip
COMPILED = {
    "round_tokens": ({"out": "*i8"}, {"CENTERED": True, "NORMAL": True, "CODES": True, "WIDTH": 4096}),
    "round_channels": ({"out": "*i8"}, {"CODES": True, "BLOCK": 1024}),
    "multiply_codes": (
        {"first": "*i8", "second": "*i8", "out": "*bf16"},
        {"SEGMENTS": 2, "STEPS": True, "BIAS": True, "TOKENS": 16, "FEATURES": 16, "WIDTH": 256},
    ),
    "scale_product": ({"out": "*bf16", "bias": "*bf16"}, {"BIAS": True, "BLOCK": 1024}),
    "rotate_tokens": ({"out": "*bf16"}, {"PADDED": 64, "MIDDLE": 8, "LAST": 16, "CHUNK": 16}),
}


@pytest.mark.parametrize("kernel", COMPILED)
def test_triton_compiles_them(kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_kernels, kernel)
    kinds, constants = COMPILED[kernel]
    signature = {
        name: "constexpr" if name in constants else {**KINDS, **kinds}.get(name, "*fp32")
        for name in inspect.signature(function.fn).parameters
    }
    compiled = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000 and compiled.metadata.shared <= 99 * 1024
