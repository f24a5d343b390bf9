import logging
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from kernel_problems import A16, CENTERED, CPU, NORMAL, STATIC, TOKEN, Problem, int_format, relative

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels import nf4
from qvlm_plugin.kernels.nf4 import NF4
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.quantizers import dynamic_codebook, normal_float_codebook

pytest.importorskip("bitsandbytes")
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
PLAIN, DOUBLE = (WeightFormat(kind="nf", bits=4, double_quantization=double) for double in (False, True))


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("activation", [A16, STATIC, TOKEN, CENTERED, NORMAL], ids=str)
@pytest.mark.parametrize("weight", [PLAIN, DOUBLE], ids=str)
@pytest.mark.parametrize("shape", [(64, 256), (40, 192), (7, 64)])
def test_nf4_equals_the_reference(dtype, activation, weight, shape):
    problem = Problem.draw(shape, dtype=dtype)
    assert problem.distance(NF4, weight, activation) < CLOSE[dtype]
    assert problem.outputs(NF4, weight, activation).dtype == dtype


@pytest.mark.parametrize("shape", [(64, 256), (40, 192), (1056, 4096)])
@pytest.mark.parametrize("activation", [A16, STATIC, TOKEN, CENTERED], ids=str)
@pytest.mark.parametrize("weight", [PLAIN, DOUBLE], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_many_tokens_equal_the_reference_to_the_bit(shape, activation, weight, bias):
    problem = Problem.draw(shape, tokens=nf4.FEW_TOKENS + 1, bias=bias, dtype=torch.bfloat16)
    parameters = problem.parameters(activation, mean=True)
    outputs, reference = (problem.outputs(kernel, weight, activation, **parameters) for kernel in (NF4, REFERENCE))
    assert torch.equal(outputs, reference)


def test_clipped_weights():
    weight = WeightFormat(kind="nf", bits=4, clipped=True)
    assert Problem.draw((32, 256)).distance(NF4, weight, A16, clip=0.5 + 0.5 * torch.rand(128)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_shapes_of_the_input(dtype, bias):
    problem = Problem.draw(bias=bias, dtype=dtype)
    layer = problem.quantized(NF4, DOUBLE, STATIC)
    expected = layer(problem.x[:24])
    assert relative(layer(problem.x[:24].view(2, 3, 4, -1)).flatten(0, 2), expected) < CLOSE[dtype]
    assert relative(layer(problem.x[0]), expected[0]) < CLOSE[dtype]
    assert layer(problem.x[:0].view(2, 0, 256)).shape == (2, 0, 64)


@pytest.mark.parametrize(
    ("weight", "dtype"), [(PLAIN, torch.float32), (DOUBLE, torch.float32), (DOUBLE, torch.bfloat16)]
)
def test_weights_take_four_bits(weight, dtype):
    problem = Problem.draw((256, 1024), bias=False, dtype=dtype)
    layer = problem.quantized(NF4, weight, A16)
    held = 8 * sum(tensor.nbytes for tensor in layer.parameters()) / (256 * 1024)
    stored = (
        8 * sum(t.nbytes for t in NF4.prepare(problem.linear.weight, None, weight, A16, {}).values()) / (256 * 1024)
    )
    assert stored == pytest.approx(weight.effective_bits((256, 1024)), abs=0.01)
    assert held < stored + 0.3  # the CPU's own layout has 16-bit scales beside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_share_no_memory(dtype):
    """Files with tensors that share memory cannot be written, and what is written to one layer stays there."""
    one, other = (Problem.draw(dtype=dtype).quantized(NF4, DOUBLE, A16) for _ in range(2))
    places = [tensor.data_ptr() for layer in (one, other) for tensor in layer.parameters()]
    assert len(set(places)) == len(places)
    assert not {normal_float_codebook(4).data_ptr(), dynamic_codebook().data_ptr()} & set(places)


@pytest.mark.parametrize("activation", [A16, STATIC], ids=str)
@pytest.mark.parametrize("weight", [PLAIN, DOUBLE], ids=str)
def test_restoring_gives_what_the_reference_holds(weight, activation):
    problem = Problem.draw(dtype=torch.bfloat16)
    arguments = problem.linear.weight, problem.linear.bias, weight, activation, problem.parameters(activation)
    restored, held = (kernel.restore(kernel.prepare(*arguments), activation) for kernel in (NF4, REFERENCE))
    assert restored.keys() == held.keys() and all(torch.equal(restored[name], held[name]) for name in held)


def test_what_it_cannot_do_is_said():
    assert "4 bits" in NF4.obstacle(WeightFormat(kind="nf", bits=3), A16, (64, 256), CPU)
    assert "normal-float" in NF4.obstacle(int_format(4), A16, (64, 256), CPU)
    assert "48 input features" in NF4.obstacle(PLAIN, A16, (64, 48), CPU)


@pytest.mark.parametrize(
    ("found", "said"), [(None, "is not installed"), ("0.45.5", "0.45.5 is too old"), ("0.49.9", "0.50 is")]
)
def test_versions_that_would_compute_something_else_are_refused(monkeypatch, found, said):
    def version(name):
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(nf4, "version", version)
    nf4._missing.cache_clear()
    try:
        obstacle = NF4.obstacle(PLAIN, A16, (64, 256), CPU)
    finally:
        nf4._missing.cache_clear()
    assert said in obstacle and "pip install 'qvlm_plugin[nf]'" in obstacle


def test_the_oldest_version_is_that_of_setup_cfg():
    assert f"bitsandbytes>={nf4._OLDEST}" in (Path(__file__).parents[2] / "setup.cfg").read_text()


def test_of_bitsandbytes_messages_one_is_kept_back(caplog):
    Problem.draw().outputs(NF4, PLAIN, A16)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure", "no kernels")
    logger.warning("Failed to load %s", "something else")
    assert caplog.messages == ["Failed to load something else"]
