import pytest
import torch
from kernel_problems import A16, CENTERED, CPU, NORMAL, STATIC, STATIC8, TOKEN, TOKEN8, Problem, int_format, relative

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels import dequantized, int4_product
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.kernels.int4_folded import INT4_FOLDED
from qvlm_plugin.kernels.reference import REFERENCE

CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("activation", [A16, STATIC, TOKEN, CENTERED, NORMAL, STATIC8, TOKEN8], ids=str)
@pytest.mark.parametrize("outliers", [0, 8])
def test_int4_equals_the_reference(dtype, activation, outliers):
    problem = Problem.draw(outliers=outliers, dtype=dtype)
    assert problem.distance(INT4, int_format(4), activation) < CLOSE[dtype]
    assert problem.outputs(INT4, int_format(4), activation).dtype == dtype


@pytest.mark.parametrize(
    "weight",
    [int_format(4, 32), int_format(4, 512), int_format(4, None), int_format(3, 64), int_format(2, 96, symmetric=True),
     int_format(4, 128, symmetric=True)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("columns", [192, 576])
def test_every_legal_group_size(weight, columns):
    assert Problem.draw((48, columns)).distance(INT4, weight, A16) < 1e-5


def test_clipped_weights():
    problem, weight = Problem.draw((32, 256)), int_format(4, 64, clipped=True)
    assert problem.distance(INT4, weight, A16, clip=0.5 + 0.5 * torch.rand(32, 4)) < 1e-5


@pytest.mark.parametrize("rows", [16, 48, 64, 80, 144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [2**12, 2**14, 2**20])
def test_many_tokens_are_multiplied_like_few(monkeypatch, rows, dtype, part):
    monkeypatch.setattr(dequantized, "PART", part)
    monkeypatch.setattr(dequantized, "LEAST_ROWS", 1)
    problem = Problem.draw((rows, 128), tokens=int4_product.FEW_TOKENS + 1, dtype=dtype)
    layer = problem.quantized(INT4, int_format(4, 64), STATIC)
    few = torch.cat([layer(half) for half in problem.x.split(25)])
    assert relative(layer(problem.x), few) < CLOSE[dtype]
    assert torch.equal(layer(problem.x), layer(problem.x))


@pytest.mark.parametrize("rows", [16, 80, 144])
@pytest.mark.parametrize("activation", [A16, STATIC, TOKEN, CENTERED], ids=str)
@pytest.mark.parametrize("weight", [int_format(4, 32), int_format(3, None, symmetric=True)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_many_tokens_equal_the_reference_to_the_bit(rows, activation, weight, bias):
    tokens = int4_product.FEW_TOKENS + 1
    problem = Problem.draw((rows, 192), tokens=tokens, bias=bias, dtype=torch.bfloat16)
    parameters = problem.parameters(activation, mean=True)
    outputs, reference = (problem.outputs(kernel, weight, activation, **parameters) for kernel in (INT4, REFERENCE))
    assert torch.equal(outputs, reference)


@pytest.mark.parametrize("kernel", [INT4, INT4_FOLDED], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("bias", [True, False])
def test_shapes_of_the_input(kernel, bias):
    problem = Problem.draw(bias=bias)
    layer = problem.quantized(kernel, int_format(4), STATIC)
    expected = layer(problem.x[:24])
    assert torch.allclose(layer(problem.x[:24].view(2, 3, 4, -1)).flatten(0, 2), expected, atol=1e-5)
    assert torch.allclose(layer(problem.x[0]), expected[0], atol=1e-5)
    assert layer(problem.x[:0]).shape == (0, 64) and layer(problem.x[:0].view(2, 0, 256)).shape == (2, 0, 64)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("kernel", [INT4, INT4_FOLDED], ids=lambda kernel: kernel.name)
def test_weights_take_four_bits(kernel):
    problem = Problem.draw((256, 1024), dtype=torch.bfloat16)
    layer = problem.quantized(kernel, int_format(4), STATIC)
    held = sum(
        parameter.nbytes for name, parameter in layer.named_parameters() if name in ("packed", "scales_and_zeros")
    )
    assert 8 * held / (256 * 1024) == 4 + 32 / 128
    neutral = kernel.prepare(problem.linear.weight, None, int_format(4), STATIC, problem.parameters(STATIC))
    assert neutral["codes"].shape == (256, 512) and neutral["codes"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("weight", "shape", "reason"),
    [
        (int_format(5), (64, 256), "up to 4 bits"),
        (WeightFormat(kind="nf", bits=4), (64, 256), "integer weights"),
        (WeightFormat(), (64, 256), "integer weights"),
        (int_format(4), (40, 256), "40 output features"),
        (int_format(4), (64, 24), "24 input features"),
        (int_format(4, 16), (64, 256), "groups of 16"),
    ],
)
def test_what_it_cannot_do_is_said(weight, shape, reason):
    assert reason in INT4.obstacle(weight, A16, shape, CPU)
    assert not INT4.supports(weight, A16, shape, CPU)
    assert "on meta" in INT4.obstacle(int_format(4), A16, (64, 256), torch.device("meta"))


def test_folding_is_for_static_unclipped_problems():
    assert "static" in INT4_FOLDED.obstacle(int_format(4), TOKEN, (64, 256), CPU)
    assert "clipping" in INT4_FOLDED.obstacle(int_format(4, clipped=True), STATIC, (64, 256), CPU)
    assert INT4_FOLDED.supports(int_format(4), STATIC, (64, 256), CPU)


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_folding_equals_the_reference_where_all_steps_are_equal(dtype):
    problem = Problem.draw(dtype=dtype)
    lower = -(torch.arange(256) % 16) / 4  # steps are equal to the bit, so that sorting keeps the order, and hit 0
    bounds = {"lower": lower, "upper": lower + 15 / 4}
    assert problem.distance(INT4_FOLDED, int_format(4), STATIC, **bounds) < CLOSE[dtype]


@pytest.mark.parametrize(("outliers", "unfolded", "folded"), [(0, 0.16, 0.17), (8, 0.16, 0.23), (64, 0.16, 0.19)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_folding_costs(outliers, unfolded, folded, dtype):
    problem = Problem.draw((256, 1024), tokens=256, outliers=outliers, dtype=dtype)
    assert problem.error(INT4, int_format(4), STATIC) < unfolded
    assert problem.error(INT4_FOLDED, int_format(4), STATIC) < folded
    assert problem.error(INT4_FOLDED, int_format(4), STATIC, **problem.parameters(STATIC, mean=True)) < folded


def test_folding_with_massive_and_constant_channels():
    problem = Problem.draw((64, 256), outliers=2, size=5000.0, dtype=torch.bfloat16)
    problem.x[:, :3] = torch.tensor([0.0, 7.0, -300.0])
    reference = problem.error(REFERENCE, int_format(4), STATIC)
    assert problem.error(INT4_FOLDED, int_format(4), STATIC) < 1.3 * reference + 0.01
