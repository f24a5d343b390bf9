import pytest
import torch
from kernel_problems import A16, CENTERED8, CPU, STATIC, STATIC8, TOKEN8, Problem, int_format, relative
from stored_codes import other_integers, other_parameters, stored

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels.base import corrected_bias
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.kernels.int4_folded import INT4_FOLDED
from qvlm_plugin.kernels.int8 import INT8
from qvlm_plugin.kernels.nf4 import NF4
from qvlm_plugin.kernels.reference import REFERENCE, round_activation

NF = WeightFormat(kind="nf", bits=4, corrected=True)
INT4_WEIGHT, INT6_WEIGHT = int_format(4, corrected=True), int_format(6, corrected=True)


@pytest.mark.parametrize("activation", [A16, TOKEN8, CENTERED8, STATIC8], ids=str)
@pytest.mark.parametrize(
    "kernel, weight",
    [(REFERENCE, NF), (REFERENCE, INT4_WEIGHT), (INT4, INT4_WEIGHT), (INT8, INT6_WEIGHT), (NF4, NF)],
    ids=lambda value: getattr(value, "name", None) or str(value),
)
@pytest.mark.parametrize("bias", [True, False])
def test_corrected_biases_keep_the_mean_output(kernel, weight, activation, bias):
    problem = Problem.draw(tokens=200, bias=bias)
    mean = problem.x.mean(dim=0)
    expected = problem.linear(problem.x).mean(dim=0).detach()

    def distance(mean):
        parameters = {"mean": mean, "clip_ratio": torch.ones(1)}  # clipping would move means too
        return float((problem.outputs(kernel, weight, activation, **parameters).mean(dim=0) - expected).norm())

    assert distance(mean) < 0.2 * distance(torch.zeros_like(mean))


KERNELS_WITH_WEIGHTS = [
    (REFERENCE, NF), (REFERENCE, INT4_WEIGHT), (INT4, INT4_WEIGHT), (INT8, INT6_WEIGHT), (NF4, NF),
    (INT4_FOLDED, INT4_WEIGHT),
]  # fmt: skip
SERVED = [
    (kernel, weight, activation)
    for kernel, weight in KERNELS_WITH_WEIGHTS
    for activation in (A16, TOKEN8, CENTERED8, STATIC, STATIC8)
    if kernel.supports(weight, activation, (64, 256), CPU)
]


@pytest.mark.parametrize(
    "kernel, weight, activation", SERVED, ids=lambda value: getattr(value, "name", None) or str(value)
)
@pytest.mark.parametrize("tokens", [3, 70])
def test_what_is_not_a_number_stays_none(kernel, weight, activation, tokens):
    """Codes are numbers whatever they were rounded from: an overflow would end in them unseen."""
    problem = Problem.draw(tokens=tokens)
    mean = {"mean": problem.x.mean(dim=0)}
    right = problem.outputs(kernel, weight, activation, **mean)
    x = problem.x.clone()
    x[1, 7] = torch.nan
    outputs = problem.outputs(kernel, weight, activation, x=x, **mean)
    assert outputs[1].isnan().all() and torch.equal(outputs[[0, 2]], right[[0, 2]])


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("activation", [A16, TOKEN8, CENTERED8, STATIC8], ids=str)
@pytest.mark.parametrize(
    ("kernel", "weight", "bound"),
    [
        (INT4, int_format(4), 1e-5),
        (INT4, int_format(3, 64, symmetric=True), 1e-5),
        (INT4, int_format(2, None), 1e-5),
        (INT8, int_format(6), 0.02),
        (INT8, int_format(5, 32, symmetric=True), 0.02),
    ],
    ids=lambda value: getattr(value, "name", None) or str(value),
)
def test_kernels_compute_with_the_plans_codes(kernel, weight, bound, activation, mean):
    problem = Problem.draw()
    weights, fmt = problem.linear.weight.detach(), stored(weight, corrected=mean)
    parameters = other_parameters(weights, weight) | ({"mean": problem.x.mean(dim=0)} if mean else {})
    values = other_integers(weights, weight).dequantize()
    bias = problem.linear.bias.detach() + ((weights - values) @ parameters["mean"] if mean else 0)
    expected = round_activation(problem.x, activation, problem.parameters(activation)) @ values.T + bias
    assert kernel.supports(fmt, activation, (64, 256), CPU)
    assert relative(problem.outputs(REFERENCE, fmt, activation, **parameters), expected) < 1e-5
    distance = relative(problem.outputs(kernel, fmt, activation, **parameters), expected)
    assert distance < bound
    nearest = problem.outputs(kernel, weight, activation)
    assert relative(nearest, expected) > 2 * distance  # and it is not that of rounding the weight


def test_folded_weights_have_codes_of_their_own():
    reason = INT4_FOLDED.obstacle(stored(int_format(4)), STATIC, (64, 256), CPU)
    assert reason == "the plan's codes do not carry over to folded weights"
    assert INT4_FOLDED.supports(int_format(4), STATIC, (64, 256), CPU)


def test_the_correction_is_what_rounding_took():
    weight, rounded, mean = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4)
    bias = corrected_bias(weight, rounded, torch.ones(3), mean)
    torch.testing.assert_close(rounded @ mean + bias, weight @ mean + 1)
    assert corrected_bias(weight, rounded, None, None) is None
