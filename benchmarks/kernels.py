"""Time and error of packed products, compared with bfloat16, at the sizes of real layers.

Each product runs on several copies of its weight in turn, so that it reads the weight from memory, as in a model, and
not from a cache. Speeds are relative to bfloat16 in the same round; errors are relative distances to the reference
arithmetic in float32 with the same rounded weights, and for bfloat16 to the product in float32.

python benchmarks/kernels.py                                          # 7B, 13B and the vision tower
python benchmarks/kernels.py --layouts 7b --tokens 1 --rounds 30      # decoding alone
python benchmarks/kernels.py --device cuda --json kernels-cuda.json
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from side_by_side import machine, show, time_in_turns, write_rows
from torch import Tensor, nn

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.kernels.int4_codes import INT4_CODES
from qvlm_plugin.kernels.int4_folded import INT4_FOLDED
from qvlm_plugin.kernels.int8 import INT8
from qvlm_plugin.kernels.int8_product import finished, int8_linear, round_to_int8
from qvlm_plugin.kernels.nf4 import NF4
from qvlm_plugin.kernels.reference import REFERENCE, quantized_values
from qvlm_plugin.kernels.selftest import self_test
from qvlm_plugin.kernels.token_codes import token_codes
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.quantizers import int_weight
from qvlm_plugin.rotation import factors, rotate, rotation_of

LAYOUTS = {
    "7b": {"attention": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)},
    "13b": {"attention": (5120, 5120), "gate, up": (13824, 5120), "down": (5120, 13824)},
    "tower": {"attention": (1024, 1024), "fc1": (4096, 1024), "fc2": (1024, 4096)},
    "demo": {"query": (576, 576), "key": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)},
}
"""Shapes [O, I] of the Linears of LLaVA's decoders and tower, and of the embedded model's decoder."""

INT4_WEIGHT = WeightFormat(kind="int", bits=4, group_size=128)
INT8_WEIGHT = WeightFormat(kind="int", bits=8, group_size=128)
NF4_WEIGHT = WeightFormat(kind="nf", bits=4, double_quantization=True)

FREE_WEIGHT = WeightFormat(kind="int", bits=4, group_size=64)
PROGRESSIVE_WEIGHT = WeightFormat(kind="int", bits=4, group_size=64, progressive=True)
A16, A4, A8 = (ActivationFormat(), *(ActivationFormat(kind="static_channel", bits=bits) for bits in (4, 8)))
TOKEN4, TOKEN8 = (ActivationFormat(kind="dynamic_token", bits=bits) for bits in (4, 8))

VARIANTS: dict[str, tuple[Kernel, WeightFormat, ActivationFormat]] = {
    "reference w4a4": (REFERENCE, INT4_WEIGHT, A4),
    "int4 w4a16": (INT4, INT4_WEIGHT, A16),
    "int4 w4a4": (INT4, INT4_WEIGHT, A4),
    "int4_folded w4a4": (INT4_FOLDED, INT4_WEIGHT, A4),
    "int4_codes w4a4 token": (INT4_CODES, PROGRESSIVE_WEIGHT, TOKEN4),
    "int4_codes w4a8 token": (INT4_CODES, PROGRESSIVE_WEIGHT, TOKEN8),
    "nf4 w4a16": (NF4, NF4_WEIGHT, A16),
    "int8 w8a16": (INT8, INT8_WEIGHT, A16),
    "int8 w8a8": (INT8, INT8_WEIGHT, A8),
    "int8 w8a8 token": (INT8, INT8_WEIGHT, TOKEN8),
}
"""Kernel and formats; activations are rounded per channel unless the name says ``token``."""

if find_spec("onnxruntime") and find_spec("onnx"):
    from matmulnbits import MATMULNBITS

    VARIANTS["onnxruntime w4a8 block"] = (MATMULNBITS, INT4_WEIGHT, A16)

ROTATION = "rotation alone"
"""The product of an input with its rotation, which ``transform=rotate`` adds once for each site."""

SEGMENTS = "segments w4a4 token"
"""A separate product for each group of weights, which free scales would need in integers. No kernel computes this."""

PREPACKED = "prepacked w8a8 token"
"""oneDNN's product with a weight in the layout that it chooses. No kernel computes this: such a tensor cannot be moved,
offloaded or compiled. On CPUs without VNNI its 16-bit sums of two products saturate (a relative error of 16 %)."""

BASELINE = "bf16"

_L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # such as 32768K; Linux only

FEW = 64
"""Products of more tokens are limited by arithmetic, so that two copies are enough."""


def _cache_bytes(device: torch.device) -> int:
    """Size of the last cache, at least 32 MiB.

    Copies of four times that size in bfloat16 still exceed it when packed to four bits.
    """
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        found = 1024 * int(_L3.read_text().rstrip("K\n")) if _L3.exists() else 0
    return max(2**25, found)


def parameters_of(activation: ActivationFormat, x: Tensor) -> dict[str, Tensor]:
    """The parameters that the format names, observed on ``x`` [T, I]."""
    values = {"lower": x.amin(0), "upper": x.amax(0), "clip_ratio": torch.ones(1, device=x.device)}
    return {name: values[name] for name in activation.parameters}


@torch.no_grad()
def measure(layout: str, shape: tuple[int, int], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one Linear, for the variants, numbers of tokens and rounds on the command line."""
    (rows, columns), tokens, device = shape, arguments.tokens, arguments.device
    torch.manual_seed(0)
    x = torch.randn(max(tokens), columns) * (0.5 * torch.randn(columns)).exp() + 0.2 * torch.randn(columns)
    x = x.to(device)
    full = nn.Linear(columns, rows, bias=False, device=device)
    linear = nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)
    linear.weight.copy_(full.weight)
    full.weight.copy_(linear.weight)
    copies = arguments.copies or max(1, 4 * _cache_bytes(device) // linear.weight.nbytes)
    modules: dict[str, list[nn.Module]] = {BASELINE: _copies(lambda: _copy(linear), copies)}
    references = {BASELINE: full}
    for name in arguments.variants:
        kernel, weight, activation = VARIANTS[name]
        if layout == "tower" and activation.kind == "static_channel":
            continue  # plans round per token there
        obstacle = kernel.obstacle(weight, activation, shape, device) or self_test(kernel, weight, activation, device)
        if obstacle:
            print(f"{name} is left out at {shape[0]} x {shape[1]}: {obstacle}")
            continue
        parameters = parameters_of(activation, x)
        quantized = QuantLinear.from_linear(linear, weight, activation, parameters, kernel)
        modules[name] = _copies(lambda quantized=quantized: _copy(quantized), copies)
        exact = nn.Linear(columns, rows, bias=False, device=device)
        exact.weight.copy_(quantized_values(linear.weight, weight, {}))
        references[name] = QuantLinear.from_linear(exact, WeightFormat(), activation, parameters, REFERENCE)
    modules[SEGMENTS] = _copies(lambda: _Segments(linear.weight, parameters_of(TOKEN4, x)), copies)
    exact = nn.Linear(columns, rows, bias=False, device=device)
    exact.weight.copy_(quantized_values(linear.weight, FREE_WEIGHT, {}))
    references[SEGMENTS] = QuantLinear.from_linear(exact, WeightFormat(), TOKEN4, parameters_of(TOKEN4, x), REFERENCE)
    if device.type == "cpu":
        modules[PREPACKED] = _copies(lambda: _Prepacked(linear.weight, parameters_of(TOKEN8, x)), copies)
        references[PREPACKED] = QuantLinear.from_linear(
            full, WeightFormat(), TOKEN8, parameters_of(TOKEN8, x), REFERENCE
        )
    turns = factors(rotation_of("", columns), device)
    modules[ROTATION] = [_Rotating(turns)] * copies
    references[ROTATION] = _Rotating(turns)
    errors = {
        name: [_error(layers[0], references[name], x[:count]) for count in tokens] for name, layers in modules.items()
    }
    references.clear()
    results = []
    for index, count in enumerate(tokens):
        inputs = x[:count].bfloat16()
        used = copies if count < FEW else min(2, copies)
        runs = {name: _run(layers[:used], inputs) for name, layers in modules.items()}
        times = time_in_turns(runs, arguments.rounds, device, arguments.seconds)
        for name, layers in modules.items():
            results.append(
                {
                    "variant": name,
                    "out_features": rows,
                    "in_features": columns,
                    "tokens": count,
                    "weight_bytes": sum(tensor.nbytes for tensor in (*layers[0].parameters(), *layers[0].buffers())),
                    "ms": 1e3 * times[name].median / used,
                    "spread": times[name].spread,
                    "times_as_fast_as_bf16": times[name].faster_than(times[BASELINE]),
                    "relative_error": errors[name][index],
                }
            )
    return results


class _Rotating(nn.Module):
    """Multiplies inputs by the `factors` of a rotation."""

    def __init__(self, turns: Sequence[Tensor]) -> None:
        super().__init__()
        self.turns = nn.ParameterList(nn.Parameter(factor, requires_grad=False) for factor in turns)

    def forward(self, x: Tensor) -> Tensor:
        return rotate(x, [*self.turns])


class _Segments(nn.Module):
    """Multiplies codes of tokens by the groups of a weight [O, I], one after another; codes take a byte each."""

    def __init__(self, weight: Tensor, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        quantized = int_weight(weight, FREE_WEIGHT, {})
        groups = quantized.codes.view(len(weight), -1, FREE_WEIGHT.group_size).to(torch.int8)
        groups = (groups - quantized.zero_point.to(torch.int8).unsqueeze(2)).unbind(1)
        kept = [
            *map(Tensor.contiguous, groups),
            quantized.scale.t().float().contiguous(),
            quantized.dequantize().sum(1),
        ]
        self.kept = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in kept)
        self.range = parameters

    def forward(self, x: Tensor) -> Tensor:
        *groups, scale, row_sum = self.kept
        codes, step, offset = token_codes(x, self.range, TOKEN4)
        return int8_linear(codes, groups, scale, None, x.dtype, step, offset, row_sum)


class _Prepacked(nn.Module):
    """Multiplies codes of tokens by the 8-bit codes of a weight [O, I] that oneDNN has packed."""

    def __init__(self, weight: Tensor, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        codes, scale = round_to_int8(weight)
        self.register_buffer("packed", torch.ops.onednn.qlinear_prepack(codes, None))
        self.register_buffer("scale", scale)
        self.register_buffer("row_sum", codes.sum(1) * scale)
        self.zero_point = torch.zeros(len(codes), dtype=torch.int64)
        self.range = parameters

    def forward(self, x: Tensor) -> Tensor:
        codes, step, offset = token_codes(x, self.range, TOKEN8)
        product = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, self.packed, self.scale, self.zero_point, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return finished(product, None, step, offset, self.row_sum).to(x.dtype)


def _copies(make: Callable[[], nn.Module], count: int) -> list[nn.Module]:
    return [make() for _ in range(count)]


def _copy(module: nn.Module) -> nn.Module:
    copy = nn.Module.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy._parameters = {
        name: value if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
        for name, value in module._parameters.items()
    }
    return copy


def _run(layers: list[nn.Module], x: Tensor) -> Callable[[], None]:
    def run() -> None:
        for layer in layers:
            layer(x)

    return run


def _error(layer: nn.Module, reference: nn.Module, x: Tensor) -> float:
    inputs = x.bfloat16()
    expected = reference(inputs.float())
    return float((layer(inputs).float() - expected).norm() / expected.norm())


def main() -> None:
    """Measure, print a table for each layout, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layouts", default="7b,13b,tower", help=f"sizes of Linears, separated by commas: {', '.join(LAYOUTS)}"
    )
    parser.add_argument(
        "--tokens",
        default=(1, 8, 600),
        type=lambda text: tuple(map(int, text.split(","))),
        help="numbers of tokens, separated by commas",
    )
    parser.add_argument(
        "--variants",
        default=[*VARIANTS],
        type=lambda text: text.split(","),
        help="variants to compare with bf16, separated by commas",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="least number of rounds, each of which measures every variant once"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="least time of the rounds, for each Linear and number of tokens"
    )
    parser.add_argument("--copies", type=int, help="of each weight; default: so many that they exceed the last cache")
    parser.add_argument("--device", default=torch.device("cpu"), type=torch.device, help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    name, rows = machine(arguments.device), []
    for layout in arguments.layouts.split(","):
        found = []
        for role, shape in LAYOUTS[layout].items():
            for row in measure(layout, shape, arguments):
                found.append({"layout": layout, "layers": role, **row, "machine": name})
        show(f"{layout} on {name}", ["layers", "tokens", "variant", *COLUMNS], [_cells(row) for row in found])
        rows += found
    write_rows(arguments.json, rows)


COLUMNS = ("MB", "ms", "x bf16", "error")


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['layers']} {row['out_features']} x {row['in_features']}",
        str(row["tokens"]),
        row["variant"],
        f"{row['weight_bytes'] / 1e6:.1f}",
        f"{row['ms']:.3f} ±{100 * row['spread']:.0f} %",
        f"{row['times_as_fast_as_bf16']:.2f}",
        f"{row['relative_error']:.1e}",
    ]


if __name__ == "__main__":
    main()
