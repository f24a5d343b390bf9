"""Integer codes of inputs with a range for each token, for integer products."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qvlm_plugin.formats import ActivationFormat
from qvlm_plugin.kernels import fusable, fused
from qvlm_plugin.kernels.sharing import once
from qvlm_plugin.quantizers import quantization_step, round_to_codes, token_range

_ELEMENTS = 2**19
"""Elements rounded at a time on a CPU: 2 MB of float32, which stay in the cores' caches between operators."""


def token_codes(
    x: Tensor, tensors: Mapping[str, Tensor], activation_format: ActivationFormat
) -> tuple[Tensor, Tensor, Tensor]:
    """Round an input to the codes of the reference arithmetic, `once` for a site's Linears.

    Args:
        x: [..., I]; N tokens.
        tensors: run-time tensors, with ``clip_ratio`` and, if inputs are centered, ``center``.
        activation_format: a format with a range for each token.

    Returns:
        Signed codes, int8 [N, I], and each token's step and offset, float32 [N, 1]: ``x̂ = offset + step * code``.
    """
    ratio, center = tensors["clip_ratio"], tensors.get("center")

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        if fusable.tokens(x, activation_format.normal):
            return fused.codes_of_tokens(x, ratio, center, activation_format)
        tokens = x.reshape(-1, x.shape[-1])
        some = max(1, _ELEMENTS // tokens.shape[1]) if x.device.type == "cpu" else len(tokens)
        if len(tokens) <= some:
            codes, step, offset = _codes(tokens, ratio, center, activation_format)
            return codes.to(torch.int8), step, offset
        codes = torch.empty_like(tokens, dtype=torch.int8)
        step, offset = torch.empty(2, len(tokens), 1, device=x.device).unbind()
        for start in range(0, len(tokens), some):
            part = slice(start, start + some)
            codes[part], step[part], offset[part] = _codes(tokens[part], ratio, center, activation_format)
        return codes, step, offset

    names = tuple(name for name in ("clip_ratio", "center") if name in tensors)
    return once(x, tensors, names, ("token codes", activation_format), compute)


def _codes(
    tokens: Tensor, ratio: Tensor, center: Tensor | None, activation_format: ActivationFormat
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_codes` of tokens [N, I], with codes in float32."""
    bits = activation_format.bits
    zero_point = 2 ** (bits - 1)
    values = tokens.float() if center is None else tokens.float() - center
    lower, upper = token_range(values, ratio, activation_format.reach)
    step, inverse = quantization_step(lower, upper, bits)
    codes = round_to_codes(values, lower, inverse, bits, in_place=values is not tokens)
    return codes.sub_(zero_point), step, lower + zero_point * step  # signed: uint8 takes 4 times as long to write
