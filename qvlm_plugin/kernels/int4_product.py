"""Products with 4-bit weights in torch's own layouts.

torch has operators for few tokens, which read the packed weight once for each: they are private, and every device lays
codes out in its own way. For many tokens the CPU's operator is slower than a product in the compute type, so there the
weight is dequantized, rows at a time, and multiplied. A weight is ``scale * (code - 8) + zero`` in both.
"""

import torch
from torch import Tensor

from qvlm_plugin.kernels.nibbles import unpack_nibbles

GROUP_SIZES = (256, 128, 64, 32)
"""Input channels to a scale that the operators know, largest first."""

FEW_TOKENS = 48
"""Up to so many tokens the CPU's packed operator is used (measured at 2048 x 2048, bfloat16, AVX-512, one thread:
operator 0.10 ms per token; dequantizing 3.5 ms and then 0.04 ms per token, so that they meet at about 60)."""

_CHUNK = 2**19
"""Weights that are dequantized at a time: 1 MB of bfloat16, which stays in a core's cache."""


def operator_group(group_size: int | None, columns: int) -> int | None:
    """The largest group of the operators that divides a weight's groups and ``columns``; None if there is none.

    Splitting a group into equal parts that repeat its scale changes no value.
    """
    group = columns if group_size is None or group_size >= columns else group_size
    return next((size for size in GROUP_SIZES if group % size == 0 and columns % size == 0), None)


def obstacle_of_product(rows: int, columns: int, device: torch.device) -> str | None:
    """Why the operators cannot multiply with a weight [rows, columns] on this device; None if they can."""
    if device.type not in ("cpu", "cuda"):
        return f"no 4-bit operator on {device.type}"
    multiple = 16 if device.type == "cpu" else 8
    if rows % multiple:
        return f"{rows} output features are not a multiple of {multiple}"
    if columns % 32:
        return f"{columns} input features are not a multiple of 32"
    return None


def pack_weight(codes: Tensor, scale: Tensor, zero: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Lay a weight out for the operator of a device.

    Args:
        codes: uint8 [O, I / 2], as `pack_nibbles` packs them.
        scale, zero: [O, G] in the compute type; ``weight = scale * (code - 8) + zero``.
        device: ``cpu`` or ``cuda``.

    Returns:
        ``packed`` (uint8 [O, I / 2] on the CPU, int32 tiles on CUDA) and ``scales_and_zeros`` [G, O, 2], in the compute
        type on the CPU and bfloat16 on CUDA, whose operator knows no other.
    """
    pairs = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous().to(device)
    codes = codes.to(device)
    if device.type == "cuda":
        # Tiles of 8 rows and 16 columns; how many of these a thread reads at once has to divide the weight's columns.
        inner = next(tiles for tiles in (8, 4, 2) if (2 * codes.shape[1]) % (16 * tiles) == 0)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, inner)
        return {"packed": packed, "scales_and_zeros": pairs.bfloat16()}
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_nibbles(codes).int(), 1)
    return {"packed": packed, "scales_and_zeros": pairs}


@torch.library.custom_op("qvlm_plugin::int4_linear", mutates_args=())
def int4_linear(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """Multiply with the transpose of a packed weight.

    Args:
        x: [N, I].
        packed, scales_and_zeros: see `pack_weight`.

    Returns:
        [N, O] in the dtype of ``scales_and_zeros``, whatever that of ``x``.
    """
    group = x.shape[1] // scales_and_zeros.shape[0]
    x = x.to(scales_and_zeros.dtype).contiguous()
    if x.device.type == "cuda":
        return torch.ops.aten._weight_int4pack_mm(x, packed, group, scales_and_zeros)
    if len(x) <= FEW_TOKENS:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros)
    rows, block = len(packed), _block_rows()
    chunk = max(block, _CHUNK // x.shape[1] // block * block)
    out = x.new_empty(len(x), rows)
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        full = first + (last - first) // block * block
        for start, end, width in ((first, full, block), (full, last, last - full)):
            if start < end:
                weight = _dequantize_blocks(packed[start:end], scales_and_zeros[:, start:end], width)
                torch.matmul(x, weight, out=out[:, start:end].view(len(x), -1, width).transpose(0, 1))
    return out


@int4_linear.register_fake
def _(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    return scales_and_zeros.new_empty(x.shape[0], scales_and_zeros.shape[1])


def _block_rows() -> int:
    """Rows that the CPU's layout keeps together: the operator's register block."""
    return 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32


def _dequantize_blocks(packed: Tensor, scales_and_zeros: Tensor, width: int) -> Tensor:
    """Blocks of ``width`` rows of a weight in the CPU's layout, transposed: [blocks, I, width].

    The layout is torch's (aten/src/ATen/native/cpu/int4mm_kernel.cpp): blocks of rows, in each of them bytes [I, width
    / 2]. With vector instructions the lower halves of a full block's bytes are its first rows and the upper halves its
    last; neighbouring rows share a byte otherwise.
    """
    columns, blocks = 2 * packed.shape[1], len(packed) // width
    bytes_ = packed.view(blocks, columns, width // 2)
    halves = [(bytes_ & 15).view(torch.int8) - 8, (bytes_ >> 4).view(torch.int8) - 8]
    vectorized = torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")
    if vectorized and width == _block_rows():
        codes = torch.cat(halves, dim=-1)
    else:
        codes = torch.stack(halves, dim=-1).flatten(-2)
    scale, zero = (p.reshape(-1, blocks, 1, width).transpose(0, 1).contiguous() for p in scales_and_zeros.unbind(-1))
    weight = codes.to(scales_and_zeros.dtype).view(blocks, scale.shape[1], -1, width)
    return torch.addcmul(zero, weight, scale, out=weight).view(blocks, columns, width)
