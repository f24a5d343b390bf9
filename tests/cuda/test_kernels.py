"""Every kernel's CUDA path, on an emulated device."""

from dataclasses import replace

import pytest
import torch
from kernel_problems import (
    A16,
    CENTERED,
    CENTERED8,
    CPU,
    STATIC,
    STATIC8,
    TOKEN,
    TOKEN8,
    Problem,
    int_format,
    relative,
)  # fmt: skip

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels import int4_product, selftest
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.kernels.int4_codes import INT4_CODES
from qvlm_plugin.kernels.int4_folded import INT4_FOLDED
from qvlm_plugin.kernels.int8 import INT8
from qvlm_plugin.kernels.nf4 import NF4
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.kernels.selftest import self_test
from qvlm_plugin.packing import pack_codes

GPU = torch.device("cuda", 1)
INPUTS = [A16, STATIC, STATIC8, TOKEN, TOKEN8, CENTERED8]
NF, DOUBLE = (WeightFormat(kind="nf", bits=4, double_quantization=double) for double in (False, True))
NARROW, PROGRESSIVE = int_format(3, 32, symmetric=True), int_format(4, 64, progressive=True)
CASES = [
    (INT4, int_format(4)), (INT4, NARROW), (INT4_CODES, PROGRESSIVE), (INT4_FOLDED, int_format(4)),
    (INT4_FOLDED, NARROW), (INT8, int_format(8)), (INT8, int_format(6, None)), (NF4, NF), (NF4, DOUBLE),
]  # fmt: skip


def named(value):
    return getattr(value, "name", None) or str(value)


SERVED = [
    (kernel, weight, activation)
    for kernel, weight in CASES
    for activation in INPUTS
    if not (kernel is INT4_FOLDED and activation.kind != "static_channel")
    and not (kernel is INT4_CODES and activation.kind != "dynamic_token")
]


@pytest.mark.parametrize(("kernel", "weight", "activation"), SERVED, ids=named)
def test_self_tests_pass(cuda, kernel, weight, activation):
    if kernel is NF4:
        pytest.importorskip("bitsandbytes")
    assert kernel.supports(weight, activation, (64, 256), GPU)
    assert self_test(kernel, weight, activation, GPU) is None


@pytest.mark.parametrize(
    ("kernel", "weight", "activation"),
    [(INT4, int_format(4), CENTERED8), (INT4_CODES, PROGRESSIVE, TOKEN), (INT8, int_format(8), STATIC8)],
    ids=named,
)
def test_self_tests_pass_with_triton(triton_cuda, monkeypatch, kernel, weight, activation):
    monkeypatch.setattr(selftest, "_TOKENS", (1, 3, 17))
    assert self_test(kernel, weight, activation, GPU) is None


def test_integer_products_are_tested_with_two_segments(cuda):
    seen = []

    def forward(x, tensors, activation_format):
        seen.append([tensors[name].shape[1] for name in tensors if name.startswith("codes_")])
        return INT8.forward(x, tensors, activation_format)

    assert self_test(replace(INT8, forward=forward), int_format(8), STATIC8, GPU) is None
    assert seen and all(widths == [128, 128] for widths in seen)

    def mistaken(x, tensors, activation_format):
        return INT8.forward(x, {**tensors, "scale": tensors["scale"].flip(0)}, activation_format)

    swapped = replace(INT8, forward=mistaken)
    assert "differ" in self_test(swapped, int_format(8), STATIC8, GPU)


@pytest.mark.parametrize("columns", [32, 64, 128, 384])
def test_codes_are_read_from_tiles(cuda, columns):
    codes = torch.randint(16, (24, columns), dtype=torch.uint8)
    scale, zero_point = torch.rand(24, columns // 32) + 0.5, torch.randint(16, (24, columns // 32), dtype=torch.uint8)
    tensors = int4_product.pack_weight(pack_codes(codes, 4), scale.bfloat16(), zero_point, GPU)
    assert torch.equal(int4_product._codes_of_tiles(tensors["packed"]).cpu(), codes)
    weight = int4_product._dequantized_tiles(tensors["packed"], tensors["scales_and_zeros"], torch.bfloat16)
    expected = (codes.view(24, -1, 32).float() - zero_point.unsqueeze(2)) * scale.bfloat16().float().unsqueeze(2)
    assert torch.equal(weight.cpu(), expected.view(24, -1).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [A16, STATIC, TOKEN, CENTERED], ids=str)
@pytest.mark.parametrize(("kernel", "weight"), [(INT4, int_format(4)), (NF4, DOUBLE)], ids=named)
def test_many_tokens_are_multiplied_in_the_compute_type(cuda, kernel, weight, activation, dtype):
    if kernel is NF4:
        pytest.importorskip("bitsandbytes")
    problem = Problem.draw(tokens=int4_product.FEW_TOKENS + 6, dtype=dtype).to(GPU)
    outputs, reference = (problem.outputs(each, weight, activation) for each in (kernel, REFERENCE))
    if dtype == torch.bfloat16 and activation in (A16, STATIC):
        assert torch.equal(outputs.cpu(), reference.cpu())
    assert outputs.dtype == dtype and relative(outputs.cpu(), reference.cpu()) < 4e-3


@pytest.mark.parametrize(
    ("kernel", "weight", "activation"),
    [case for case in SERVED if case[2] in (STATIC8, TOKEN8)],
    ids=named,
)
def test_a_device_computes_like_the_cpu(cuda, kernel, weight, activation):
    """Codes, scales and their order are those of the CPU's path; what is rounded on the way differs."""
    if kernel is NF4:
        pytest.importorskip("bitsandbytes")
    problem = Problem.draw(tokens=70, dtype=torch.bfloat16, outliers=8)
    layer = problem.quantized(kernel, weight, activation)
    there = problem.to(GPU).quantized(kernel, weight, activation)
    for tokens in (1, 5, 16, 17, 70):
        with torch.no_grad():
            found, expected = there(problem.x[:tokens].to(GPU)), layer(problem.x[:tokens])
        assert relative(found.cpu(), expected) < 8e-3, tokens


@pytest.mark.parametrize("tokens", [1, 16, 17, 70])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float16, 8e-3), (torch.bfloat16, 8e-3)])
def test_progressive_codes_equal_the_reference(cuda, dtype, close, tokens):
    problem = Problem.draw(tokens=tokens, dtype=dtype, outliers=8).to(GPU)
    for activation in (TOKEN, CENTERED):
        outputs, reference = (problem.outputs(each, PROGRESSIVE, activation).cpu() for each in (INT4_CODES, REFERENCE))
        assert outputs.dtype == dtype and relative(outputs, reference) < close


def test_progressive_codes_are_multiplied_as_integers(cuda):
    problem = Problem.draw((24, 96), tokens=17).to(GPU)
    layer = problem.quantized(INT4_CODES, int_format(4, 32, progressive=True), TOKEN8)
    with cuda.counting(), torch.no_grad():
        layer(problem.x)
    assert "aten._int_mm.default" in {call.operator for call in cuda.launches} and not cuda.synchronizations


@pytest.mark.parametrize("tokens", [1, 5])
def test_few_tokens_take_operators_that_read_packed_weights(cuda, tokens):
    cases = [
        (INT4, int_format(4), "aten._weight_int4pack_mm.default", 2),
        (INT8, int_format(8), "aten._weight_int8pack_mm.default", 4),
    ]
    for kernel, weight, operator, launches in cases:
        problem = Problem.draw(tokens=tokens, dtype=torch.bfloat16).to(GPU)
        layer = problem.quantized(kernel, weight, A16)
        with cuda.counting(), torch.no_grad():
            layer(problem.x)
        assert operator in {call.operator for call in cuda.launches}
        assert cuda.launches.total() == launches  # with the bias
        assert not cuda.synchronizations and not cuda.uploads


def test_doubly_quantized_scales_are_read_as_they_are(cuda):
    pytest.importorskip("bitsandbytes")
    problem = Problem.draw(tokens=1, dtype=torch.bfloat16).to(GPU)
    layer = problem.quantized(NF4, DOUBLE, A16)
    with cuda.counting(), torch.no_grad():
        layer(problem.x)
    assert [call.operator for call in cuda.launches] == ["bitsandbytes.gemm_4bit.default"]


def test_what_cuda_cannot_multiply_is_said(cuda):
    assert "20 output or 256 input features are not" in INT8.obstacle(int_format(8), A16, (20, 256), GPU)
    assert "12 output features are not a multiple of 8" in INT4.obstacle(int_format(4), A16, (12, 256), GPU)
    assert INT4.supports(int_format(4), A16, (24, 256), GPU) and not INT4.supports(int_format(4), A16, (24, 256), CPU)
