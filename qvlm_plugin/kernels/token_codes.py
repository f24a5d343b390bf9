"""Integer codes of inputs with a range for each token, for integer products."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qvlm_plugin.kernels import fusable, fused
from qvlm_plugin.kernels.sharing import once
from qvlm_plugin.quantizers import by_rows, quantization_step, round_to_codes, token_range


def token_codes(x: Tensor, tensors: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round an input to the codes of the reference arithmetic, `once` for a site's Linears.

    Args:
        x: [..., I]; N tokens.
        tensors: run-time tensors, with ``clip_ratio`` and, if inputs are centered, ``center``.
        bits: 2 to 8.

    Returns:
        Signed codes, int8 [N, I], and each token's step and offset, float32 [N, 1]: ``x̂ = offset + step * code``.
    """
    zero_point = 2 ** (bits - 1)

    def signed(x: Tensor, lower: Tensor, inverse: Tensor) -> Tensor:
        return round_to_codes(x, lower, inverse, bits).sub_(zero_point)

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        if fusable.tokens(x):
            return fused.codes_of_tokens(x, tensors["clip_ratio"], tensors.get("center"), bits)
        tokens = x.reshape(-1, x.shape[-1])
        tokens = tokens.float() - tensors["center"] if "center" in tensors else tokens
        lower, upper = token_range(tokens, tensors["clip_ratio"])
        step, inverse = quantization_step(lower, upper, bits)
        return by_rows(signed, tokens, (lower, inverse), torch.int8), step, lower + zero_point * step

    names = tuple(name for name in ("clip_ratio", "center") if name in tensors)
    return once(x, tensors, names, ("token codes", bits), compute)
