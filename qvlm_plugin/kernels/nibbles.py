"""Two 4-bit codes to a byte: the layout of packed codes on disk, and of bitsandbytes."""

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes below 16, uint8 [..., 2n] → uint8 [..., n]; of two neighbours the first is in the upper half."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(-2)
