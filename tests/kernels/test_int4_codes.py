import pytest
import torch
from kernel_problems import A16, CENTERED, CENTERED8, CPU, NORMAL, STATIC, TOKEN, TOKEN8, Problem, int_format, relative

from qvlm_plugin.formats import ActivationFormat, stored_format
from qvlm_plugin.kernels import dequantized, int8_product
from qvlm_plugin.kernels.int4_codes import INT4_CODES
from qvlm_plugin.kernels.int4_integers import FEW_TOKENS, whole_numbers
from qvlm_plugin.kernels.int4_product import pack_weight
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.packing import pack_codes
from qvlm_plugin.quantizers import nearest_codes, stored_parameters

CLOSE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
TOKEN6 = ActivationFormat(kind="dynamic_token", bits=6)


def progressive(bits=4, group_size=64, **more):
    return int_format(bits, group_size, progressive=True, **more)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("activation", [TOKEN, CENTERED, NORMAL, TOKEN6, TOKEN8, CENTERED8], ids=str)
@pytest.mark.parametrize("outliers", [0, 8])
def test_it_equals_the_reference(dtype, activation, outliers):
    problem = Problem.draw(outliers=outliers, dtype=dtype)
    assert problem.distance(INT4_CODES, progressive(), activation) < CLOSE[dtype]
    assert problem.outputs(INT4_CODES, progressive(), activation).dtype == dtype


@pytest.mark.parametrize("tokens", [1, 2, FEW_TOKENS, FEW_TOKENS + 1, 700])
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_any_number_of_tokens(tokens, dtype):
    problem = Problem.draw((80, 192), tokens=tokens, dtype=dtype)
    assert problem.distance(INT4_CODES, progressive(), TOKEN) < CLOSE[dtype]


@pytest.mark.parametrize(
    "weight",
    [progressive(4, 32), progressive(4, 512), progressive(3, 64), progressive(2, 96, symmetric=True),
     progressive(4, 64, symmetric=True)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("rows", [16, 48, 144])
def test_bits_groups_and_rows(weight, rows):
    assert Problem.draw((rows, 192)).distance(INT4_CODES, weight, TOKEN) < CLOSE[torch.float32]


@pytest.mark.parametrize("bias", [True, False])
def test_clipped_stored_and_corrected_weights(bias):
    problem = Problem.draw((32, 256), bias=bias)
    clip = {"clip": 0.5 + 0.5 * torch.rand(32, 4)}
    assert problem.distance(INT4_CODES, progressive(clipped=True), CENTERED, **clip) < CLOSE[torch.float32]
    mean = {"mean": problem.x.mean(0)}
    assert problem.distance(INT4_CODES, progressive(corrected=True), CENTERED, **mean) < CLOSE[torch.float32]
    stored = stored_format(progressive())
    codes = stored_parameters(nearest_codes(2 * problem.linear.weight, progressive()), stored)
    assert problem.distance(INT4_CODES, stored, TOKEN, **codes) < CLOSE[torch.float32]


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_no_tokens(dtype):
    problem = Problem.draw(dtype=dtype)
    layer = problem.quantized(INT4_CODES, progressive(), TOKEN)
    assert layer(problem.x[:0]).shape == (0, 64)


@pytest.mark.parametrize("bias", [True, False])
def test_shapes_of_the_input(bias):
    problem = Problem.draw(bias=bias)
    layer = problem.quantized(INT4_CODES, progressive(), TOKEN)
    expected = layer(problem.x[:24])
    assert torch.equal(layer(problem.x[:24].view(2, 3, 4, -1)).flatten(0, 2), expected)
    assert torch.allclose(layer(problem.x[0]), expected[0], atol=1e-6)
    assert layer(problem.x[:0]).shape == (0, 64) and layer(problem.x[:0].view(2, 0, 256)).shape == (2, 0, 64)


@pytest.mark.parametrize("part", [2**12, 2**14, 2**20])
def test_parts_of_a_product_are_the_whole(monkeypatch, part):
    problem = Problem.draw((144, 128), tokens=40, dtype=torch.float16)
    whole = problem.outputs(INT4_CODES, progressive(), TOKEN)
    monkeypatch.setattr(dequantized, "PART", part)
    monkeypatch.setattr(dequantized, "LEAST_ROWS", 1)
    monkeypatch.setattr(int8_product, "_TOKENS", 7)
    assert torch.equal(problem.outputs(INT4_CODES, progressive(), TOKEN), whole)


def test_whole_numbers_are_multiples_of_codes():
    codes = torch.randint(16, (48, 64), dtype=torch.uint8)
    zero_point = torch.randint(16, (48, 2), dtype=torch.uint8)
    multiple = (127 // torch.maximum(zero_point, 15 - zero_point)).to(torch.uint8)
    packed = pack_weight(pack_codes(codes, 4), multiple.bfloat16(), zero_point, CPU)
    found = torch.cat([part.clone() for part in whole_numbers(packed)])
    expected = (codes.int().view(48, 2, 32) - zero_point.unsqueeze(2)) * multiple.unsqueeze(2)
    assert torch.equal(found.int(), expected) and expected.abs().max() > 100


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 8), (torch.float16, 4), (torch.bfloat16, 4)])
def test_weights_are_unpacked_in_float32_alone(dtype, bits):
    problem = Problem.draw((64, 512), dtype=dtype)
    layer = problem.quantized(INT4_CODES, progressive(), TOKEN)
    largest = max(layer.parameters(), key=lambda tensor: tensor.nbytes)
    assert largest.nbytes == 64 * 512 * bits / 8
    outputs = layer(problem.x)
    for other in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ):  # the layout stays, whatever the model becomes; inputs get other codes
        assert relative(layer.to(other)(problem.x.to(other)), outputs) < 0.1


def test_a_model_of_another_kernel_computes_the_same():
    problem = Problem.draw(dtype=torch.bfloat16)
    formats = progressive(), CENTERED
    neutral = INT4_CODES.prepare(problem.linear.weight, problem.linear.bias, *formats, problem.parameters(CENTERED))
    restored = INT4_CODES.restore(neutral, CENTERED)
    with torch.no_grad():
        outputs = REFERENCE.forward(problem.x, REFERENCE.pack(restored, CENTERED, CPU), CENTERED)
    assert relative(outputs, problem.outputs(REFERENCE, *formats)) < 1e-2


@pytest.mark.parametrize(
    ("weight", "activation", "shape", "reason"),
    [
        (int_format(4, 64), TOKEN, (64, 256), "progressive"),
        (progressive(), STATIC, (64, 256), "per token"),
        (progressive(), A16, (64, 256), "per token"),
        (progressive(), TOKEN, (40, 256), "40 output features"),
        (progressive(4, 16), TOKEN, (64, 256), "groups of 16"),
    ],
)
def test_what_it_cannot_do_is_said(weight, activation, shape, reason):
    assert reason in INT4_CODES.obstacle(weight, activation, shape, CPU)
    assert "on meta" in INT4_CODES.obstacle(progressive(), TOKEN, (64, 256), torch.device("meta"))
