"""Integer codes packed into bytes: the one layout of files, kernels' neutral tensors, and bitsandbytes.

Along the last axis, as many codes share a byte as fit where their width divides 8: four of 2 bits, two of 4, one of 8;
of neighbours the first is in the upper bits, and the last byte is filled up with zeros. Codes of other widths have a
byte each.
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
    for place in range(1, each):
        packed |= codes[..., place::each] << (8 - bits * (place + 1))
    return packed


def unpack_codes(packed: Tensor, bits: int, columns: int | None = None) -> Tensor:
    """The inverse of `pack_codes`, for the first ``columns`` codes; None unpacks all that the bytes hold."""
    each = codes_per_byte(bits)
    if each == 1:
        return packed[..., :columns]
    codes = [packed >> (8 - bits * (place + 1)) & 2**bits - 1 for place in range(each)]
    return torch.stack(codes, dim=-1).flatten(-2)[..., :columns]
