"""GPTQ on small Linears: what its parts are defined as, and what it must never be worse than."""

import itertools

import pytest
import torch

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.methods import gptq as rounding
from qvlm_plugin.methods.gptq import Factors, Moments
from qvlm_plugin.methods.options import GPTQOptions
from qvlm_plugin.quantizers import IntWeight, double_quantize, nearest_codes

INT, NF = WeightFormat(kind="int", bits=3, group_size=32), WeightFormat(kind="nf", bits=3, double_quantization=True)
OPTIONS = GPTQOptions(rounding="gptq")


def gptq(weight, weight_format, moments, options):
    return rounding.gptq(weight, weight_format, Factors.of(moments, options), options.correction)


def problem(rows=24, columns=96, tokens=400, seed=0):
    """A weight and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + mixing)
    return torch.randn(rows, columns, generator=generator) / columns**0.5, inputs


def values(quantized, weight_format):
    if isinstance(quantized, IntWeight):
        return quantized.dequantize()
    absmax = double_quantize(quantized.absmax).dequantize() if weight_format.double_quantization else quantized.absmax
    return type(quantized)(quantized.codes, absmax, quantized.bits).dequantize()


def output_error(weight, quantized, weight_format, inputs):
    """Of each output channel: [O]."""
    return ((values(quantized, weight_format) - weight) @ inputs.T).square().sum(dim=1)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    "weight_format",
    [
        INT,
        NF,
        INT.model_copy(update={"group_size": None, "symmetric": True}),
        INT.model_copy(update={"progressive": True}),
    ],
    ids=str,
)
def test_outputs_err_much_less_than_with_the_nearest_codes(weight_format, act_order):
    weight, inputs = problem()
    found = gptq(weight, weight_format, Moments.of(inputs), GPTQOptions(rounding="gptq", act_order=act_order))
    nearest = nearest_codes(weight, weight_format)
    errors = [output_error(weight, one, weight_format, inputs).sum() for one in (found, nearest)]
    assert errors[0] < 0.62 * errors[1]
    assert found.codes.max() < 2**weight_format.bits and not torch.equal(found.codes, nearest.codes)


@pytest.mark.parametrize("seed", range(3))
def test_no_output_channel_is_worse_than_with_the_nearest_codes(seed):
    """By the damped errors, which GPTQ minimizes. Where inputs are independent, a greedy order can lose."""
    weight, _ = problem(rows=200, columns=8, seed=seed)
    inputs = torch.randn(300, 8, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-1, 1, 8)
    coarse = WeightFormat(kind="int", bits=2, group_size=8)
    hessian = Factors.of(Moments.of(inputs), OPTIONS).hessian.float()
    errors = []
    for found in (gptq(weight, coarse, Moments.of(inputs), OPTIONS), nearest_codes(weight, coarse)):
        error = found.dequantize() - weight
        errors.append(((error @ hessian) * error).sum(dim=1))
    assert (errors[0] <= errors[1]).all() and (errors[0] < errors[1]).any()


def test_against_all_codes_of_a_small_weight():
    """It gains at least two thirds of what the best of all roundings gains over the nearest codes."""
    weight, inputs = problem(rows=6, columns=6, seed=4)
    fmt = WeightFormat(kind="int", bits=2, group_size=6)
    moments = Moments.of(inputs)
    grid = nearest_codes(weight, fmt)
    every = torch.tensor([*itertools.product(range(4), repeat=6)], dtype=torch.float32)
    best = []
    for row in range(6):
        error = (every - grid.zero_point[row]) * grid.scale[row] - weight[row]
        best.append(((error @ moments.hessian) * error).sum(dim=1).min())
    found = output_error(weight, gptq(weight, fmt, moments, OPTIONS), fmt, inputs).sum()
    nearest = output_error(weight, grid, fmt, inputs).sum()
    least = torch.stack(best).sum()
    assert least * 0.999 <= found <= least + (nearest - least) / 3


def test_uncorrelated_inputs_of_one_size_leave_the_nearest_codes():
    weight, _ = problem()
    found = gptq(weight, INT, Moments(torch.eye(96)), OPTIONS)
    assert torch.equal(found.codes, nearest_codes(weight, INT).codes)


@pytest.mark.parametrize("weight_format", [INT, NF], ids=str)
def test_the_order_of_columns_does_not_move_groups(weight_format):
    """Scales are those of the weight as it lies, whatever the order in which columns are rounded."""
    weight, inputs = problem()
    inputs = inputs * torch.logspace(-1, 1, 96).flip(0)
    found, nearest = gptq(weight, weight_format, Moments.of(inputs), OPTIONS), nearest_codes(weight, weight_format)
    scale = "scale" if weight_format.kind == "int" else "absmax"
    assert torch.equal(getattr(found, scale), getattr(nearest, scale))


def test_unseen_and_constant_inputs_are_no_obstacle():
    weight, inputs = problem()
    dead = inputs.clone()
    dead[:, ::2] = 0
    found = gptq(weight, INT, Moments.of(dead), OPTIONS)
    assert torch.equal(found.codes[:, ::2], nearest_codes(weight, INT).codes[:, ::2])
    nothing = gptq(weight, INT, Moments(torch.zeros(96, 96)), OPTIONS)
    assert torch.equal(nothing.codes, nearest_codes(weight, INT).codes)


def test_weights_of_tokens_are_repetitions():
    _, inputs = problem(tokens=60)
    counts = torch.randint(1, 4, (60,), generator=torch.Generator().manual_seed(1))
    repeated = Moments.of(inputs.repeat_interleave(counts, dim=0))
    assert torch.allclose(Moments.of(inputs, weights=counts.float()).hessian, repeated.hessian, rtol=1e-4, atol=1e-3)


def test_the_correction_makes_up_for_what_was_lost_below():
    """With fine codes the output on the quantized inputs is as near to the wanted one as a weight can make it."""
    weight, wanted = problem(rows=8, columns=32, tokens=2000)
    lossy = wanted + 0.3 * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5))
    fine, target = WeightFormat(kind="int", bits=8), wanted @ weight.T
    moments = Moments.of(lossy, wanted)
    errors = []
    for share in (0.0, 0.5, 1.0):
        options = GPTQOptions(rounding="gptq", correction=share, damping=1e-6)
        found = gptq(weight, fine, moments if share else Moments.of(lossy), options)
        errors.append(float((lossy @ found.dequantize().T - target).square().sum()))
    least = (lossy @ torch.linalg.lstsq(lossy, target).solution - target).square().sum()
    assert errors[0] > errors[1] > errors[2] and errors[2] == pytest.approx(float(least), rel=1e-2)
