"""Integer codes packed into bytes: the layout of plan files, of kernels' neutral tensors, and of bitsandbytes.

Codes whose width divides 8 share bytes along the last axis: four of 2 bits, two of 4, one of 8. The first of the codes
is in the upper bits, and the last byte is padded with zeros. Codes of other widths take a byte each.
"""

import torch
from torch import Tensor


def codes_per_byte(bits: int) -> int:
    """How many codes of ``bits`` (1 to 8) share a byte."""
    return 8 // bits if 8 % bits == 0 else 1


def packed_width(columns: int, bits: int) -> int:
    """How many bytes ``columns`` codes take."""
    return -(-columns // codes_per_byte(bits))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, uint8 [..., C] → uint8 [..., `packed_width`]."""
    each = codes_per_byte(bits)
    if each == 1:
        return codes
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each))
    packed = codes[..., ::each] << (8 - bits)
    for position in range(1, each):
        packed |= codes[..., position::each] << (8 - bits * (position + 1))
    return packed


def unpack_codes(packed: Tensor, bits: int, columns: int | None = None) -> Tensor:
    """The inverse of `pack_codes`, for the first ``columns`` codes; None: all, padding included."""
    each = codes_per_byte(bits)
    if each == 1:
        return packed[..., :columns]
    codes = [packed >> (8 - bits * (position + 1)) & 2**bits - 1 for position in range(each)]
    return torch.stack(codes, dim=-1).flatten(-2)[..., :columns]
