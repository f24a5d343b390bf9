import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.reference import REFERENCE, round_activation, round_weight
from qvlm_plugin.linear import QuantLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "activation", [ActivationFormat(), ActivationFormat(kind="static_channel", bits=4),
                   ActivationFormat(kind="dynamic_token", bits=4)]
)  # fmt: skip
@pytest.mark.parametrize(
    "weight", [WeightFormat(), WeightFormat(kind="int", bits=4, group_size=8), WeightFormat(kind="nf", bits=3)]
)
def test_reference_arithmetic_is_the_product_of_the_rounded_operands(weight, activation, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 10, bias=bias), torch.randn(2, 5, 24)
    parameters = {
        "none": {},
        "static_channel": {"lower": x.amin(dim=(0, 1)) * 0.8, "upper": x.amax(dim=(0, 1)) * 0.8},
        "dynamic_token": {"clip_ratio": torch.tensor([0.9])},
    }[activation.kind]
    quantized = QuantLinear.from_linear(linear, weight, activation, parameters, REFERENCE)
    expected = F.linear(round_activation(x, activation, parameters), round_weight(linear.weight, weight), linear.bias)
    assert torch.equal(quantized(x), expected)
    assert torch.equal(quantized(x[:, :1]), quantized(x)[:, :1]) or torch.allclose(
        quantized(x[:, :1]), expected[:, :1], atol=1e-6
    )
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_compute_type_is_kept(dtype):
    linear = nn.Linear(16, 4).to(dtype)
    weight, activation = WeightFormat(kind="int", bits=4), ActivationFormat(kind="dynamic_token", bits=8)
    quantized = QuantLinear.from_linear(linear, weight, activation, {"clip_ratio": torch.ones(1)}, REFERENCE)
    assert quantized(torch.randn(3, 16, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    "values", [{"kind": "int"}, {"kind": "none", "bits": 4}, {"kind": "int", "bits": 12}, {"kind": "nf", "bits": 1},
               {"kind": "float", "bits": 4}, {"kind": "int", "bits": 4, "group_size": 0}]
)  # fmt: skip
def test_impossible_formats_are_refused(values):
    with pytest.raises(ValueError):
        WeightFormat(**values)


def test_stored_codes_are_of_a_quantized_weight_and_not_clipped():
    with pytest.raises(ValueError, match="stored codes need a quantized weight"):
        WeightFormat(kind="none", stored=True)
    with pytest.raises(ValueError, match="exclude clip"):
        WeightFormat(kind="int", bits=4, stored=True, clipped=True)
    plain = WeightFormat(kind="int", bits=4, group_size=32)
    codes = WeightFormat(**plain.model_dump(), stored=True)
    assert codes.effective_bits((64, 96)) == plain.effective_bits((64, 96)) and codes.groups((64, 96)) == 64 * 3
    assert str(codes) == f"{plain} stored" and WeightFormat.model_validate_json(codes.model_dump_json()) == codes
    assert "stored" not in plain.model_dump_json()  # as formats were before, which table hashes are made of


def test_effective_bits_count_what_is_stored():
    assert WeightFormat(kind="int", bits=4, group_size=128).effective_bits((64, 256)) == 4 + (16 + 4) / 128
    assert WeightFormat(kind="int", bits=4, group_size=128, symmetric=True).effective_bits((64, 64)) == 4 + 16 / 64
    assert WeightFormat(kind="int", bits=8).effective_bits((64, 256)) == 8 + 24 / 256
    assert WeightFormat(kind="nf", bits=4, double_quantization=True).effective_bits((64, 256)) == pytest.approx(
        4.127, abs=1e-3
    )
    assert WeightFormat(kind="nf", bits=4).effective_bits((64, 256)) == 4.5
