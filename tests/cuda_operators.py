"""What CUDA's own operators ask for and compute, by plain arithmetic on the CPU: for `emulated_cuda`.

Preconditions and layouts are those of torch's sources: aten/src/ATen/native/cuda/int4mm.cu, int8mm.cu and Blas.cpp.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def require(condition: bool, operator: str, what: str) -> None:
    """Raise what torch would, with the name of the operator."""
    if not condition:
        raise RuntimeError(f"{operator} on CUDA: {what}")


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """An int8 product [M, K] x [K, N]; more than 16 rows, all else in multiples of 8."""
    require(a.dtype == b.dtype == torch.int8 and a.dim() == b.dim() == 2, "_int_mm", "int8 matrices are expected")
    require(a.shape[0] > 16, "_int_mm", f"self.size(0) needs to be greater than 16, but got {a.shape[0]}")
    for name, size in (("self.size(1)", a.shape[1]), ("mat2.size(1)", b.shape[1])):
        require(size > 0 and size % 8 == 0, "_int_mm", f"{name} needs to be a multiple of 8, but got {size}")
    require(a.shape[1] == b.shape[0], "_int_mm", "sizes do not match")
    return aten._int_mm.default(a, b)


def convert_weight_to_int4pack(codes: Tensor, inner: int) -> Tensor:
    """Lay codes out in tiles: uint8 [N, K / 2], even columns in the upper halves → int32 [N / 8, K / 16 inner, 32,
    inner / 2]; see `places_in_tiles`."""
    name = "_convert_weight_to_int4pack"
    require(codes.dtype == torch.uint8 and codes.dim() == 2 and codes.is_contiguous(), name, "uint8 [N, K / 2]")
    require(inner in (2, 4, 8), name, f"innerKTiles is 2, 4 or 8, but got {inner}")
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    require(rows % 8 == 0 and columns % (16 * inner) == 0, name, f"[{rows}, {columns}] does not divide into tiles")
    packed = torch.zeros(rows // 8, columns // (16 * inner), 32, inner // 2, dtype=torch.int64)
    for shift, row, column in places_in_tiles(packed.shape):
        byte = codes[row, column // 2].long()
        packed |= (byte >> 4 if column.flatten()[0] % 2 == 0 else byte & 15) << shift
    return packed.to(torch.int32)


def places_in_tiles(shape: torch.Size) -> list[tuple[int, Tensor, Tensor]]:
    """Where the codes of the words of a packed weight come from: for each of the eight in a word, by how many bits it
    is shifted, and its row and column, int64 of ``shape``.

    A tile has 8 rows and 16 columns. Each of 32 threads has one row (thread / 4), and of every tile the columns 2 t, 2
    t + 1, 2 t + 8 and 2 t + 9 (t: thread modulo 4). A word of a thread holds those of two neighbouring tiles: the even
    columns in its lower half, the odd ones in its upper half.
    """
    tile_row, outer, thread, word = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    row, first = 8 * tile_row + thread // 4, (outer * 2 * shape[3] + 2 * word) * 16 + 2 * (thread % 4)
    return [(4 * place + 16 * odd, row, first + 8 * place + odd) for place in range(4) for odd in range(2)]


def codes_of_int4pack(packed: Tensor) -> Tensor:
    """The codes that `convert_weight_to_int4pack` laid out: uint8 [N, K]."""
    codes = torch.zeros(8 * packed.shape[0], packed.shape[1] * packed.shape[3] * 32, dtype=torch.uint8)
    for shift, row, column in places_in_tiles(packed.shape):
        codes[row, column] = (packed.long() >> shift & 15).to(torch.uint8)
    return codes


def weight_int4pack_mm(x: Tensor, packed: Tensor, group: int, scales_and_zeros: Tensor) -> Tensor:
    """bfloat16 [M, K] times the weights ``scale * (code - 8) + zero`` that are rounded to bfloat16: [M, N]."""
    name, (_, columns) = "_weight_int4pack_mm", x.shape
    require(x.dtype == torch.bfloat16 and x.is_contiguous() and x.dim() == 2, name, "A is bfloat16 and contiguous")
    require(packed.dtype == torch.int32 and packed.is_contiguous() and packed.dim() == 4, name, "B is int32 tiles")
    inner = 2 * packed.shape[3]
    require(inner in (2, 4, 8) and packed.shape[1:3] == (columns // (16 * inner), 32), name, "B's tiles are not A's")
    require(group in (32, 64, 128, 256) and columns % group == 0, name, f"no groups of {group}")
    require(
        scales_and_zeros.dtype == torch.bfloat16
        and scales_and_zeros.is_contiguous()
        and scales_and_zeros.shape == (columns // group, 8 * packed.shape[0], 2),
        name,
        "scales and zeros are bfloat16 [K / group, N, 2] and contiguous",
    )
    scale, zero = (pair.t().float().repeat_interleave(group, dim=1) for pair in scales_and_zeros.unbind(-1))
    weight = ((codes_of_int4pack(packed).float() - 8) * scale + zero).bfloat16()
    return F.linear(x.float(), weight.float()).bfloat16()


def weight_int8pack_mm(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """[M, K] times int8 [N, K] and a scale [N], in float32: [M, N] in the dtype of x."""
    require(x.dim() == weight.dim() == 2 and scale.dim() == 1, "_weight_int8pack_mm", "two matrices and a vector")
    require(weight.dtype == torch.int8, "_weight_int8pack_mm", "the weight is int8")
    require((x.shape[1], len(weight)) == (weight.shape[1], len(scale)), "_weight_int8pack_mm", "sizes do not match")
    return (F.linear(x.float(), weight.float()) * scale.float()).to(x.dtype)


def gemm_4bit(
    x: Tensor,
    codes: Tensor,
    shape: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """bitsandbytes' product with a 4-bit weight; what it reads by pointer has to be contiguous, and of its type."""
    name = "bitsandbytes::gemm_4bit"
    require(codes.is_contiguous() and codes.numel() == shape[0] * shape[1] // 2, name, "codes are contiguous")
    require(absmax.dtype == torch.float32 and absmax.is_contiguous(), name, "absmax is float32")
    require(bias is None or (bias.dtype == x.dtype and bias.shape == (shape[0],)), name, "the bias is of A's type")
    if absmax_8bit is not None:
        require(absmax_8bit.dtype == torch.uint8 and absmax_8bit.dim() == 1, name, "absmax_8bit is a uint8 vector")
        require(absmax_code.dtype == torch.float32 and absmax_code.shape == (256,), name, "256 values")
        require(absmax_offset.dtype == torch.float32 and absmax_offset.dim() == 0, name, "the offset is a number")
    return torch.ops.bitsandbytes.gemm_4bit.default(
        x, codes, shape, absmax, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` without torch's choice of a kernel, which asks the GPU: on devices it is one
    kernel, unless gradients are taken."""
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if query.device.type == "cpu" or (torch.is_grad_enabled() and query.requires_grad):
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, **options
        )[0]
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale
    )[0]


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    compute_logsumexp: bool,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention in one kernel; without the sums that only gradients need."""
    output = aten._scaled_dot_product_attention_math.default(
        query, key, value, bias, dropout, is_causal, None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )[0]
    nothing = query.new_empty(0, dtype=torch.int64)
    return output, query.new_empty(0, dtype=torch.float32), nothing, nothing


OPERATORS = {
    "aten._int_mm.default": int_mm,
    "aten._convert_weight_to_int4pack.default": convert_weight_to_int4pack,
    "aten._weight_int4pack_mm.default": weight_int4pack_mm,
    "aten._weight_int8pack_mm.default": weight_int8pack_mm,
    "aten._scaled_dot_product_efficient_attention.default": efficient_attention,
    "bitsandbytes.gemm_4bit.default": gemm_4bit,
}
"""Operators that compute otherwise on CUDA, or nowhere else, or ask for more there."""

LAUNCHES = {
    "aten._weight_int8pack_mm.default": 3,  # with casts of the input and the output
    "aten.sort.default": 2,
    "aten.sort.stable": 2,
}
"""How many kernels an operator starts, where it is not one."""
