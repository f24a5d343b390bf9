import pytest
import torch

from qvlm_plugin.kernels.folding import LARGEST_SUM, encode, fold, with_encoding
from qvlm_plugin.quantizers import fake_quantize


def problem(rows=24, columns=40, spread=3.0):
    torch.manual_seed(0)
    x = torch.randn(50, columns) * (spread * torch.randn(columns)).exp() + torch.randn(columns)
    x[:, 3] = 7.0  # constant
    return torch.randn(rows, columns), torch.randn(rows), x


def codes_of(x, folded, bits):
    tensors = with_encoding(folded.codes)
    return encode(x, tensors, bits, torch.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("largest_code", [128, 256])
@pytest.mark.parametrize("with_mean", [False, True])
def test_an_unrounded_folded_product_is_the_reference(bits, largest_code, with_mean):
    weight, bias, x = problem()
    lower, upper = x.amin(0) * 0.9, x.amax(0) * 0.9
    lower[3] = upper[3] = 7.0
    folded = fold(weight, bias, lower, upper, bits, largest_code, x.mean(0) if with_mean else None)
    codes = codes_of(x, folded, bits)
    product = codes @ folded.weight.T * folded.multiplier + folded.bias(folded.weight)
    expected = fake_quantize(x, lower, upper, bits) @ weight.T + bias
    assert torch.allclose(product, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    assert codes.min() >= -largest_code and codes.max() < largest_code
    assert torch.equal(codes, codes.round()) and codes.abs().max() <= 255
    assert torch.equal(folded.step, folded.step.sort().values)


def test_constant_channels_are_exact_whatever_the_weight_is_rounded_to():
    weight, bias, x = problem()
    x = x[:1].expand(50, -1)
    folded = fold(weight, bias, x.amin(0), x.amax(0), 4, 128)
    codes = codes_of(x, folded, 4)
    assert torch.allclose(codes @ folded.weight.T + folded.bias(torch.zeros_like(weight)), x @ weight.T + bias)


def test_the_mean_output_survives_rounding():
    weight, bias, x = problem()
    mean = x.mean(0)
    folded = fold(weight, bias, x.amin(0), x.amax(0), 8, 256, mean)
    rounded = folded.weight + 0.1 * folded.weight.abs().mean() * torch.randn(weight.shape)
    product = codes_of(x, folded, 8) @ rounded.T * folded.multiplier + folded.bias(rounded)
    shift = product.mean(0) - (x @ weight.T + bias).mean(0)
    spread = (product - (x @ weight.T + bias)).std(0)
    assert (shift.abs() < 0.1 * spread).all()


@pytest.mark.parametrize("size", [1e-20, 1e-6, 1.0, 1e6, 1e20])
def test_steps_of_any_size_stay_in_the_range_of_half_precision(size):
    weight, _, x = problem()
    x = x * size
    folded = fold(weight, None, x.amin(0), x.amax(0), 8, 256)
    assert LARGEST_SUM / 2 < (folded.weight.abs().sum(1).max() * 255) <= LARGEST_SUM
    assert folded.multiplier.log2() == folded.multiplier.log2().round()


def test_a_weight_of_zeros():
    folded = fold(torch.zeros(4, 8), None, -torch.ones(8), torch.ones(8), 4, 128)
    assert folded.multiplier == 1 and not folded.weight.any() and not folded.bias(folded.weight).any()
