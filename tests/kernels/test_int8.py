import pytest
import torch
from kernel_problems import (
    A16,
    CENTERED,
    CENTERED8,
    CPU,
    NORMAL,
    STATIC,
    STATIC8,
    TOKEN,
    TOKEN8,
    Problem,
    int_format,
    relative,
)

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels import dequantized, int8, int8_product
from qvlm_plugin.kernels.int8 import INT8
from qvlm_plugin.kernels.reference import REFERENCE

NF6, NF8 = (WeightFormat(kind="nf", bits=bits, double_quantization=True) for bits in (6, 8))
STATIC6, TOKEN6 = (ActivationFormat(kind=kind, bits=6) for kind in ("static_channel", "dynamic_token"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [A16, STATIC, TOKEN, CENTERED, NORMAL, STATIC8, TOKEN8, CENTERED8], ids=str)
@pytest.mark.parametrize(
    "weight", [int_format(8), int_format(6), int_format(8, None), int_format(5, 32), NF6, NF8], ids=str
)
def test_int8_is_close_to_the_reference(dtype, activation, weight):
    problem = Problem.draw(dtype=dtype)
    assert problem.distance(INT8, weight, activation) < 0.02
    assert problem.outputs(INT8, weight, activation).dtype == dtype


@pytest.mark.parametrize("activation", [TOKEN8, TOKEN, TOKEN6], ids=str)
def test_rounding_of_tokens_is_the_references(activation):
    problem = Problem.draw()
    with torch.no_grad():  # a weight that 8 bits for each output channel hold without rounding
        codes = torch.randint(-126, 127, (64, 256))
        codes[:, 0] = 127
        problem.linear.weight.copy_(codes / 64)
    weight = WeightFormat(kind="int", bits=8, symmetric=True)
    assert problem.distance(INT8, weight, activation) < 1e-5


@pytest.mark.parametrize(
    ("weight", "activation", "bound"),
    [(int_format(8), STATIC8, 0.02), (int_format(6), STATIC6, 0.06), (int_format(8), TOKEN8, 0.09)], ids=str,
)  # fmt: skip
def test_outlier_channels(weight, activation, bound):
    problem = Problem.draw((64, 1024), outliers=8)
    assert problem.error(INT8, weight, activation) < bound
    assert problem.error(INT8, weight, activation) < 1.5 * problem.error(REFERENCE, weight, activation) + 0.005


def test_segments_and_the_centre_carry_massive_activations(monkeypatch):
    problem = Problem.draw((64, 1024), tokens=200)
    problem.x[:1, :3] *= 3000  # one token, as an attention sink
    ordinary = problem.x[1:]

    def error():
        outputs = problem.outputs(INT8, int_format(8), STATIC8, x=ordinary)
        return relative(outputs, problem.full()[1:])

    reference = relative(problem.outputs(REFERENCE, int_format(8), STATIC8, x=ordinary), problem.full()[1:])
    assert error() < 1.5 * reference
    monkeypatch.setattr(int8, "SEGMENTS", 1)
    assert error() > 3 * reference


def test_a_known_mean_does_not_hurt():
    problem = Problem.draw((64, 512), outliers=4)
    with_mean = problem.error(INT8, int_format(8), STATIC8, **problem.parameters(STATIC8, mean=True))
    assert with_mean < 1.1 * problem.error(INT8, int_format(8), STATIC8)


def test_constant_channels_are_exact():
    problem = Problem.draw((24, 64), tokens=1)
    assert problem.distance(INT8, int_format(8), STATIC8) < 1e-5


def test_clipped_weights():
    problem, weight = Problem.draw((32, 256)), int_format(6, 64, clipped=True)
    assert problem.distance(INT8, weight, STATIC8, clip=0.5 + 0.5 * torch.rand(32, 4)) < 0.02


@pytest.mark.parametrize("activation", [A16, STATIC8, TOKEN8, CENTERED8], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (33, 50), (64, 256), (8, 2048)])
@pytest.mark.parametrize("bias", [True, False])
def test_shapes(activation, shape, bias):
    problem = Problem.draw(shape, bias=bias)
    layer = problem.quantized(INT8, int_format(8), activation)
    expected = layer(problem.x[:24])
    assert torch.allclose(layer(problem.x[:24].view(2, 3, 4, -1)).flatten(0, 2), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(layer(problem.x[0]), expected[0], rtol=1e-4, atol=1e-4)
    assert layer(problem.x[:0]).shape == (0, shape[0])
    assert layer(problem.x[:0].view(2, 0, shape[1])).shape == (2, 0, shape[0])
    assert problem.distance(INT8, int_format(8), activation) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_tokens_are_multiplied_like_few(monkeypatch, dtype):
    monkeypatch.setattr(dequantized, "PART", 2**12)
    monkeypatch.setattr(dequantized, "LEAST_ROWS", 1)
    problem = Problem.draw(dtype=dtype)
    layer = problem.quantized(INT8, int_format(8), A16)
    few = torch.cat([layer(part) for part in problem.x.split(int8_product.FEW_TOKENS)])
    assert relative(layer(problem.x), few) < 8e-3


@pytest.mark.parametrize("activation", [STATIC8, TOKEN8, CENTERED8], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("tokens", "outputs"), [(7, 2**20), (640, 100), (7, 100), (1, 1)])
def test_parts_of_integer_products_equal_the_whole_to_the_bit(monkeypatch, activation, bias, tokens, outputs):
    problem = Problem.draw((48, 256), tokens=30, bias=bias)
    layer = problem.quantized(INT8, int_format(8), activation)
    whole = layer(problem.x)
    monkeypatch.setattr(int8_product, "_TOKENS", tokens)
    monkeypatch.setattr(int8_product, "_OUTPUTS", outputs)
    monkeypatch.setattr(int8_product, "_ROWS", 1)
    assert torch.equal(layer(problem.x), whole)


@pytest.mark.parametrize("columns", [50, 2000, 2048, 4096])
@pytest.mark.parametrize("activation", [STATIC8, TOKEN8, CENTERED8], ids=str)
def test_widths_of_the_integer_product_are_fast_ones(columns, activation):
    problem = Problem.draw((16, columns))
    layer = problem.quantized(INT8, int_format(8), activation)
    widths = [tensor.shape[1] for name, tensor in layer.named_parameters() if name.startswith("codes_")]
    assert all(width < 1024 or (width % 64 == 0 and width % 2048) for width in widths)
    assert columns <= sum(widths) < columns + 128 * len(widths)


def test_weights_take_eight_bits():
    problem = Problem.draw((256, 1024), dtype=torch.bfloat16)
    for weight in (int_format(6), int_format(8), NF8):
        layer = problem.quantized(INT8, weight, STATIC8)
        held = sum(tensor.nbytes for name, tensor in layer.named_parameters() if name.startswith(("codes_", "scale")))
        assert 8 <= 8 * held / (256 * 1024) < 8.6


def test_what_it_cannot_do_is_said():
    assert "5 to 8 bits" in INT8.obstacle(int_format(4), A16, (64, 64), CPU)
    assert "5 to 8 bits" in INT8.obstacle(WeightFormat(), A16, (64, 64), CPU)
    assert "multiple of 8" in INT8.obstacle(int_format(8), A16, (12, 64), torch.device("cuda"))
    assert "on meta" in INT8.obstacle(int_format(8), A16, (64, 64), torch.device("meta"))
    assert INT8.supports(int_format(8), A16, (12, 63), CPU)
