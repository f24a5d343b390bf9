"""Kernels that round an input in one launch: what they compute, and that Triton compiles them."""

import inspect

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qvlm_plugin.formats import ActivationFormat
from qvlm_plugin.kernels import fused, triton_kernels
from qvlm_plugin.kernels.reference import round_activation
from qvlm_plugin.quantizers import quantization_step, round_to_codes, round_to_points, token_range

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(dtype, tokens=3, columns=200):
    torch.manual_seed(0)
    x = torch.randn(tokens, columns) * (0.5 * torch.randn(columns)).exp() + 0.2
    return x.to(dtype), torch.tensor([0.9]), torch.randn(columns) / 4


def close(values, expected, step):
    """Equal but for ties, which fall to either side: a step at most, and seldom."""
    distance = (values.cpu().float() - expected.float()).abs() / step
    assert distance.max() < 1.02 and (distance > 0.02).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("centered", [False, True])
def test_points_of_tokens(cuda, dtype, bits, centered):
    x, ratio, center = inputs(dtype)
    fmt = ActivationFormat(kind="dynamic_token", bits=bits, centered=centered)
    expected = round_activation(x, fmt, {"clip_ratio": ratio, "center": center})
    arguments = [value.to("cuda:0") for value in (x, ratio, center)]
    with cuda.counting():
        points = fused.points_of_tokens(*arguments[:2], arguments[2] if centered else None, bits)
    assert cuda.launches.total() == 1 and points.dtype == dtype
    lower, upper = token_range(x.float() - (center if centered else 0), ratio)
    close(points, expected, (upper - lower) / (2**bits - 1) + 0.01 * x.float().abs())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("centered", [False, True])
def test_codes_of_tokens(cuda, bits, centered):
    x, ratio, center = inputs(torch.bfloat16)
    arguments = [value.to("cuda:0") for value in (x.view(1, 3, -1), ratio, center)]
    codes, step, offset = fused.codes_of_tokens(*arguments[:2], arguments[2] if centered else None, bits)
    distance = x.float() - (center if centered else 0)
    lower, upper = token_range(distance, ratio)
    right_step, inverse = quantization_step(lower, upper, bits)
    assert codes.dtype == torch.int8 and codes.shape == (3, 200) and step.shape == offset.shape == (3, 1)
    torch.testing.assert_close(step.cpu(), right_step)
    torch.testing.assert_close(offset.cpu(), lower + 2 ** (bits - 1) * right_step)
    close(codes, round_to_codes(distance, lower, inverse, bits) - 2 ** (bits - 1), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [200, 1024, 1100])
def test_channels_to_the_bit(cuda, dtype, columns):
    x, _, _ = inputs(dtype, 2, columns)
    lower = -torch.rand(columns)
    step, inverse = quantization_step(lower, lower + torch.rand(columns).sub(0.1).clamp_min(0), 4)
    expected = round_to_points(x, lower, step, inverse, 4)
    bounds = [value.to("cuda:0") for value in (lower, step, inverse)]
    with cuda.counting():
        points = fused.points_of_channels(x.to("cuda:0"), *bounds, 4)
    assert torch.equal(points.cpu(), expected)
    index, low = torch.randperm(columns)[: columns // 2], torch.arange(columns).float() % 7 - 3
    right = (round_to_codes(x, lower, inverse, 4) + low)[:, index]
    bounds = tuple(value.to("cuda:0") for value in (lower, inverse, low))
    for kind in (torch.int8, torch.bfloat16):
        with cuda.counting():
            codes = fused.codes_of_channels(x.to("cuda:0"), bounds, index.to("cuda:0"), 4, kind)
        assert codes.dtype == kind and torch.equal(codes.cpu(), right.to(kind)) and cuda.launches.total() == 1


def test_constant_tokens_and_what_is_not_a_number(cuda):
    x = torch.tensor([[2.0, 2.0, 2.0], [1.0, torch.nan, 3.0], [1.0, 2.0, 3.0], [torch.inf, 0.0, 1.0]], device="cuda:0")
    points = fused.points_of_tokens(x, torch.ones(1, device="cuda:0"), None, 4).cpu()
    assert points[0].tolist() == [2, 2, 2] and points[1].isnan().all() and points[3].isnan().all()
    torch.testing.assert_close(points[2], torch.tensor([1.0, 2.0, 3.0]), rtol=0.04, atol=0)
    lower, step = torch.zeros(3, device="cuda:0"), torch.ones(3, device="cuda:0")
    points = fused.points_of_channels(x, lower, step, step, 4).cpu()
    assert points[1, 1].isnan() and points[1, [0, 2]].tolist() == [1, 3] and points[3, 0] == 15


def test_it_is_for_cuda_without_gradients(cuda):
    x = torch.ones(3, device="cuda:0")
    assert fused.is_fused(x) and not fused.is_fused(x.cpu())
    assert not fused.is_fused(x.requires_grad_())
    with torch.no_grad():
        assert fused.is_fused(x)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["round_tokens", "round_channels"])
def test_triton_compiles_them(kernel, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_kernels, kernel)
    names = list(inspect.signature(function.fn).parameters)
    kinds = {"x": "*bf16", "out": "*i8", "index": "*i64", "columns": "i32", "width": "i32", "levels": "i32"}
    constants = {"CENTERED": True, "CODES": True, "WIDTH": 4096, "BLOCK": 1024}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in names}
    source = ASTSource(function, signature, {name: constants[name] for name in names if name in constants})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000
