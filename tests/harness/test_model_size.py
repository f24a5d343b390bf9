import torch
from torch import nn

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.harness.model_size import memory, packed_bytes
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.linear import QuantLinear


def test_packed_bytes_depend_on_formats_only():
    linear = nn.Linear(64, 8)
    formats = WeightFormat(kind="int", bits=4, group_size=32, symmetric=False), ActivationFormat()
    quantized = QuantLinear.from_linear(linear, *formats, {}, REFERENCE)
    model = nn.ModuleDict({"quantized": quantized, "norm": nn.LayerNorm(64), "tied": nn.Linear(64, 4, bias=False)})
    model["again"] = model["tied"]
    codes, scales, rest = 64 * 8 * 4, 16 * (16 + 4), 16 * (8 + 2 * 64 + 4 * 64)
    assert packed_bytes(model) == (codes + scales + rest) // 8
    assert packed_bytes(model.to(torch.bfloat16)) == (codes + scales + rest) // 8
    assert memory(model)["weight_bytes"] > 2 * 64 * 8


def test_memory_counts_shared_weights_once_and_held_bytes_only():
    model = nn.ModuleDict({"a": nn.Linear(8, 4, bias=False), "b": nn.Linear(8, 4, bias=False)})
    assert memory(model)["weight_bytes"] == 2 * 8 * 4 * 4
    model["b"].weight = model["a"].weight
    assert memory(model)["weight_bytes"] == 8 * 4 * 4
    model["a"].register_buffer("scale", torch.zeros(3, dtype=torch.float16))
    model["c"] = nn.Linear(100, 100, device="meta")
    measured = memory(model)
    assert measured["weight_bytes"] == 8 * 4 * 4 + 6
    assert measured["peak_memory_bytes"] > 10**7 and measured["peak_memory_of"] == "process"
