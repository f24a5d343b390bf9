"""Products with 4-bit weights in torch's own layouts.

torch has private operators for few tokens, which read the packed weight once for each token or for a few of them; each
device has its own layout of codes. For many tokens they are slower than a product in the compute type. The weight is
then dequantized (on CPUs some rows at a time) and multiplied; outputs of a bfloat16 model are bitwise those of the
whole dequantized weight. A weight is ``scale * (code - zero_point)``; the operators compute ``scale * (code - 8) +
zero``, where the zero is a multiple of the scale, rounded to the compute type.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qvlm_plugin.kernels.dequantized import product_by_rows, rows_at_once
from qvlm_plugin.kernels.operators import operator
from qvlm_plugin.packing import unpack_codes
from qvlm_plugin.quantizers import IntWeight

WIDTH = 4
"""Bits in which the operators store a code, also a narrower one."""

GROUP_SIZES = (256, 128, 64, 32)
"""Numbers of input channels per scale that the operators support, largest first."""

FEW_TOKENS = 64
"""Up to this number of 16-bit tokens the packed operators are used (measured on a CPU at 4096 x 4096, bfloat16,
AVX-512, two threads: operator 0.20 ms per token; dequantizing 6 ms and then 0.09 ms per token; in float32 the operator
is not vectorized). CUDA's operator reads the weight once for 16 tokens."""


def operator_group(group_size: int | None, columns: int) -> int | None:
    """The largest group of the operators that divides a weight's groups and ``columns``; None if there is none.

    Splitting a group into equal parts that repeat its scale changes no value.
    """
    group = columns if group_size is None or group_size >= columns else group_size
    return next((size for size in GROUP_SIZES if group % size == 0 and columns % size == 0), None)


def groups_of_operator(quantized: IntWeight) -> Tensor:
    """For each of the operator's groups, the index of the weight's group that contains it: int64 [G]."""
    columns = quantized.codes.shape[1]
    starts = torch.arange(0, columns, operator_group(quantized.group_size, columns), device=quantized.codes.device)
    return starts // quantized.group_size


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


def pack_weight(codes: Tensor, scale: Tensor, zero_point: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Lay a weight out for the operator of a device.

    Args:
        codes: uint8 [O, I / 2], as `pack_codes` packs them at `WIDTH` bits.
        scale: [O, G] in the compute type.
        zero_point: uint8 [O, G].
        device: ``cpu`` or ``cuda``.

    Returns:
        ``packed`` (uint8 [O, I / 2] on the CPU, int32 tiles on CUDA) and ``scales_and_zeros`` [G, O, 2], in the compute
        type on the CPU and in bfloat16 on CUDA, whose operator supports no other.
    """
    zero = (scale.float() * (8 - zero_point.float())).to(scale.dtype)
    pairs = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous().to(device)
    codes = codes.to(device)
    if device.type == "cuda":
        # Columns must be divisible by 16 times the number of tiles (8 rows, 16 columns) that a thread reads at once.
        inner = next(tiles for tiles in (8, 4, 2) if (2 * codes.shape[1]) % (16 * tiles) == 0)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, inner)
        return {"packed": packed, "scales_and_zeros": pairs.bfloat16()}
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_codes(codes, WIDTH).int(), 1)
    return {"packed": packed, "scales_and_zeros": pairs}


@operator("int4_linear", like=lambda x, packed, pairs, *_: x.new_empty(x.shape[0], pairs.shape[1]))
def int4_linear(x: Tensor, packed: Tensor, scales_and_zeros: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by the transpose of a packed weight, and add a bias.

    Args:
        x: [N, I].
        packed, scales_and_zeros: see `pack_weight`.
        bias: [O] or None.

    Returns:
        [N, O] in the dtype of ``x``.
    """
    on_cuda, few = x.device.type == "cuda", len(x) <= FEW_TOKENS
    if on_cuda and not few:
        return F.linear(x, _dequantized_tiles(packed, scales_and_zeros, x.dtype), bias)
    operand = x.to(scales_and_zeros.dtype).contiguous()
    if not on_cuda and (not few or operand.dtype == torch.float32):
        return _times_dequantized(operand, packed, scales_and_zeros, bias).to(x.dtype)
    operators, group = torch.ops.aten, x.shape[1] // scales_and_zeros.shape[0]
    operator = operators._weight_int4pack_mm if on_cuda else operators._weight_int4pack_mm_for_cpu
    product = operator(operand, packed, group, scales_and_zeros).to(x.dtype)
    return product if bias is None else product.add_(bias)


def _dequantized_tiles(packed: Tensor, scales_and_zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in CUDA's layout, dequantized: [O, I] in ``dtype``."""
    grouped, scale = unpacked_tiles(packed, scales_and_zeros)
    return grouped.to(dtype).mul_(scale.to(dtype).unsqueeze(2)).flatten(1)


def unpacked_tiles(packed: Tensor, scales_and_zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in CUDA's layout minus their zero points, int8 [O, G, I / G], and the scales [O, G]."""
    codes = _codes_of_tiles(packed).view(torch.int8)
    scale, zero_point = _scale_and_zero_point(scales_and_zeros)
    return codes.view(len(codes), scale.shape[1], -1).sub_(zero_point.unsqueeze(2)), scale


def _codes_of_tiles(packed: Tensor) -> Tensor:
    """The codes in CUDA's layout, int32 [O / 8, I / 16 tiles, 32, tiles / 2]: uint8 [O, I].

    The layout is torch's (aten/src/ATen/native/cuda/int4mm.cu). In a tile of 8 rows and 16 columns, each of 32 threads
    has four columns of one row, two in each half of the row. A word has a thread's codes of two neighbouring tiles:
    even columns in its first two bytes, odd columns in the others. The lower half of a byte is from the row's first
    half.
    """
    blocks, columns, _, words = packed.shape
    by_thread = packed.view(torch.uint8).view(blocks, columns, 8, 4, words, 2, 2).permute(0, 2, 1, 4, 6, 3, 5)
    codes = by_thread.new_empty(8 * blocks, 32 * columns * words)
    low, high = codes.view(blocks, 8, columns, words, 2, 2, 4, 2).unbind(5)
    torch.bitwise_and(by_thread, 15, out=low)
    torch.bitwise_right_shift(by_thread, 4, out=high)
    return codes


def _scale_and_zero_point(scales_and_zeros: Tensor) -> tuple[Tensor, Tensor]:
    """A weight's scales [O, G] in their own dtype, and its zero points, int8 [O, G]."""
    scale, zero = (pair.t().contiguous() for pair in scales_and_zeros.unbind(-1))
    return scale, (8 - zero / scale).round_().to(torch.int8)  # rounding makes it exact


def _times_dequantized(x: Tensor, packed: Tensor, scales_and_zeros: Tensor, bias: Tensor | None) -> Tensor:
    """`int4_linear` for many tokens on a CPU; ``x`` is contiguous."""
    unpacked = UnpackedRows.of(packed, scales_and_zeros)
    scale = scales_and_zeros[..., 0].t().contiguous()
    weight = x.new_empty(unpacked.at_once, x.shape[1])  # reused: new memory costs as much as arithmetic

    def dequantize(span: slice) -> Tensor:
        grouped = unpacked[span]
        weight[: len(grouped)].view_as(grouped).copy_(grouped).mul_(scale[span].unsqueeze(2))
        return weight[: len(grouped)]

    return product_by_rows(x, len(packed), unpacked.at_once, dequantize, bias)


@dataclass(frozen=True, eq=False)
class UnpackedRows:
    """Codes of a weight in the CPU's layout minus their zero points, unpacked some rows at a time.

    Attributes:
        packed: uint8 [O, I / 2].
        zero_point: int8 [O, G].
        codes: uint8 [``at_once``, I], a buffer for the rows requested last.
        by_row: uint8 [``at_once``, I / 2], a buffer.
    """

    packed: Tensor
    zero_point: Tensor
    codes: Tensor
    by_row: Tensor

    @classmethod
    def of(cls, packed: Tensor, scales_and_zeros: Tensor) -> "UnpackedRows":
        """The rows of a weight from `pack_weight`."""
        _, zero_point = _scale_and_zero_point(scales_and_zeros)
        rows, half = packed.shape
        count = rows_at_once(rows, 2 * half, _block_rows())
        buffers = (packed.new_empty(count, width) for width in (2 * half, half))
        return cls(packed, zero_point, *buffers)

    @property
    def at_once(self) -> int:
        """Maximum number of rows to request at a time: a multiple of a block, or all."""
        return len(self.codes)

    def __getitem__(self, span: slice) -> Tensor:
        """The rows of ``span``: int8 [rows, G, I / G]."""
        count, block = span.stop - span.start, _block_rows()
        whole = count // block * block
        for part, width in ((slice(whole), block), (slice(whole, count), count - whole)):
            if width and part.stop:
                _unpack_blocks(self.packed[span][part], width, self.by_row[part], self.codes[part])
        grouped = self.codes[:count].view(torch.int8).view(count, self.zero_point.shape[1], -1)
        return grouped.sub_(self.zero_point[span].unsqueeze(2))


def _block_rows() -> int:
    """Rows of a block in the CPU's layout: the operator's register block."""
    return 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32


def _unpack_blocks(packed: Tensor, width: int, by_row: Tensor, codes: Tensor) -> None:
    """Write the codes of blocks of ``width`` rows in the CPU's layout.

    The layout is torch's (aten/src/ATen/native/cpu/int4mm_kernel.cpp): blocks of rows, each with bytes [I, width / 2].
    With vector instructions, the lower halves of a full block's bytes are its first rows and the upper halves its last
    rows; otherwise neighbouring rows share a byte.

    Args:
        packed: uint8 [O, I / 2].
        width: number of rows of a block; divides O.
        by_row: uint8 [O, I / 2], a buffer.
        codes: uint8 [O, I], the output.
    """
    columns, blocks = 2 * packed.shape[1], len(packed) // width
    by_row = by_row.view(blocks, width // 2, columns)
    by_row.copy_(packed.view(blocks, columns, width // 2).transpose(1, 2))  # cheapest as bytes
    codes = codes.view(blocks, width, columns)
    vectorized = torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2") and width == _block_rows()
    low, high = codes.chunk(2, dim=1) if vectorized else (codes[:, ::2], codes[:, 1::2])
    torch.bitwise_and(by_row, 15, out=low)
    torch.bitwise_right_shift(by_row, 4, out=high)
