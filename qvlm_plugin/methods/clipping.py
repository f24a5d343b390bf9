"""Weight clipping as in AWQ: each group of weights gets the narrowed range that errs least at the Linear's output.

The error that a group adds to its output channel is e·x for its weights' rounding errors e and inputs x; over all
tokens its square sums to eᵀ(Σ x xᵀ)e. So the search needs only one small matrix of second moments for each group of
input channels, whatever the number of tokens, and every group is searched by itself.
"""

from collections.abc import Sequence
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor

from qvlm_plugin.formats import NF_BLOCK, WeightFormat, clipped_format
from qvlm_plugin.kernels.reference import round_weight


def group_errors(error: Tensor, weight_format: WeightFormat, tokens: Tensor | None) -> Tensor:
    """Squared output error that each weight group causes by itself, summed over tokens; without these, that of weights.

    Where a block of normal-float weights reaches over several output channels, it is the sum over these.

    Args:
        error: of the weights, [O, I] float32.
        weight_format: decides the groups.
        tokens: inputs [N, I] float32, or None.

    Returns:
        float32, in the shape of the format's ``clip``: [O, G] for ``int``, [blocks] for ``nf``.
    """
    rows, columns = error.shape
    if tokens is None:
        caused = _split(error, weight_format).square().sum(dim=-1).flatten()[: weight_format.groups((rows, columns))]
        return caused.view(rows, -1) if weight_format.kind == "int" else caused
    period = _rows_per_period(columns, weight_format)
    # Each token on each row of the period, alone: rows that share a block are different outputs and do not mix.
    alone = torch.eye(period, device=tokens.device)[:, None, :, None] * tokens[None, :, None, :]
    inputs = _split(alone.view(-1, columns), weight_format)
    moments = torch.einsum("npi,npj->pij", inputs, inputs)
    groups = _split(error, weight_format).transpose(0, 1)
    caused = ((groups @ moments) * groups).sum(dim=-1).T.flatten()[: weight_format.groups((rows, columns))]
    return caused.view(rows, -1) if weight_format.kind == "int" else caused


def search_clip(weight: Tensor, weight_format: WeightFormat, tokens: Tensor | None, factors: Sequence[float]) -> Tensor:
    """The factor of each weight group that errs least; ties keep the earlier one.

    Doubly quantized block scales depend on each other; each factor is judged as if all blocks had it.

    Args:
        weight: [O, I].
        weight_format: it is rounded to.
        tokens: what the Linear reads, [N, I] float32; None for the least squared error of the weight itself.
        factors: candidates in (0, 1].

    Returns:
        float32 [O, G] for ``int``, [blocks] for ``nf``.
    """
    weight, weight_format = weight.float(), clipped_format(weight_format)
    errors = [
        group_errors(round_weight(weight, weight_format, weight.new_tensor(factor)) - weight, weight_format, tokens)
        for factor in factors
    ]
    return weight.new_tensor(factors)[torch.stack(errors).argmin(dim=0)]


def _rows_per_period(columns: int, weight_format: WeightFormat) -> int:
    """After how many rows the groups begin at the first column again."""
    return 1 if weight_format.kind == "int" else lcm(columns, NF_BLOCK) // columns


def _split(x: Tensor, weight_format: WeightFormat) -> Tensor:
    """x [R, I] as groups [periods, groups in a period, group size], filled up with zeros."""
    rows, columns = x.shape
    if weight_format.kind == "int":
        size = min(weight_format.group_size or columns, columns)
        return F.pad(x, (0, -columns % size)).view(rows, -1, size)
    period = lcm(columns, NF_BLOCK)
    return F.pad(x.flatten(), (0, -x.numel() % period)).view(-1, period // NF_BLOCK, NF_BLOCK)
