"""Integer codes of inputs with a range for each token, for integer products."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qvlm_plugin.kernels import fusable, fused
from qvlm_plugin.kernels.sharing import once
from qvlm_plugin.quantizers import by_rows

_TINY = torch.finfo(torch.float32).tiny


def token_codes(x: Tensor, tensors: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round an input to the codes of the reference arithmetic; `once` for a site's Linears.

    Args:
        x: [..., I]; N tokens.
        tensors: run-time tensors, among them ``clip_ratio`` and, where inputs are centered, ``center``.
        bits: 2 to 8.

    Returns:
        Signed codes, int8 [N, I], and each token's step and offset, float32 [N, 1]: ``x̂ = offset + step * code``.
    """
    zero_point = 2 ** (bits - 1)

    def signed(x: Tensor, offset: Tensor, inverse: Tensor) -> Tensor:
        return x.sub(offset).mul_(inverse).round_().clamp_(-zero_point, zero_point - 1)

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        if fusable.tokens(x):
            return fused.codes_of_tokens(x, tensors["clip_ratio"], tensors.get("center"), bits)
        tokens = x.reshape(-1, x.shape[-1]).float()
        tokens = tokens - tensors["center"] if "center" in tensors else tokens
        # `token_range` and `quantization_step` in half the operators: with one token each takes longer to start than
        # to run. A constant token has a step of 0; any inverse will do.
        mean, ratio = tokens.mean(dim=-1, keepdim=True), tensors["clip_ratio"]
        lower, upper = mean.lerp(tokens.amin(dim=-1, keepdim=True), ratio), tokens.amax(dim=-1, keepdim=True)
        step = mean.lerp(upper, ratio).sub_(lower).div_(2**bits - 1)
        offset = lower.add_(step, alpha=zero_point)
        return by_rows(signed, tokens, (offset, step.clamp_min(_TINY).reciprocal_()), torch.int8), step, offset

    names = tuple(name for name in ("clip_ratio", "center") if name in tensors)
    return once(x, tensors, names, ("token codes", bits), compute)
