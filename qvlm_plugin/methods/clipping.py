"""Weight clipping as in AWQ: each weight group gets the clipping factor with the least error at the Linear's output.

The error that a group adds to its output channel is e·x for its weights' rounding errors e and inputs x; its square,
summed over tokens, is eᵀ(Σ x xᵀ)e. So the search needs only one small matrix of second moments for each group of input
channels, for any number of tokens, and searches every group separately.
"""

from collections.abc import Sequence
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor

from qvlm_plugin.formats import NF_BLOCK, WeightFormat, clipped_format
from qvlm_plugin.kernels.reference import round_weight


def group_errors(error: Tensor, weight_format: WeightFormat, tokens: Tensor | None) -> Tensor:
    """Squared output error that each weight group causes by itself, summed over tokens.

    For a block of normal-float weights that spans several output channels, it is the sum over these.

    Args:
        error: errors of the weights, [O, I] float32.
        weight_format: decides the groups.
        tokens: inputs [N, I] float32; None: the squared error of the weights themselves.

    Returns:
        float32, in the shape of the format's ``clip``: [O, G] for ``int``, [blocks] for ``nf``.
    """
    rows, columns = error.shape
    if tokens is None:
        caused = (
            split_groups(error, weight_format).square().sum(dim=-1).flatten()[: weight_format.groups((rows, columns))]
        )
        return caused.view(rows, -1) if weight_format.kind == "int" else caused
    period = _rows_per_period(columns, weight_format)
    # Put each token on one row of the period at a time: rows that share a block are different outputs and do not mix.
    alone = torch.eye(period, device=tokens.device)[:, None, :, None] * tokens[None, :, None, :]
    inputs = split_groups(alone.view(-1, columns), weight_format)
    moments = torch.einsum("npi,npj->pij", inputs, inputs)
    groups = split_groups(error, weight_format).transpose(0, 1)
    caused = ((groups @ moments) * groups).sum(dim=-1).T.flatten()[: weight_format.groups((rows, columns))]
    return caused.view(rows, -1) if weight_format.kind == "int" else caused


def search_clip(weight: Tensor, weight_format: WeightFormat, tokens: Tensor | None, factors: Sequence[float]) -> Tensor:
    """The factor of each weight group with the least error; the first of equal ones.

    Doubly quantized block scales depend on each other; each factor is evaluated with all blocks using it.

    Args:
        weight: [O, I].
        weight_format: the format that it is rounded to.
        tokens: the Linear's inputs, [N, I] float32; None: minimise the squared error of the weight itself.
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
    """The number of rows after which groups start at the first column again."""
    return 1 if weight_format.kind == "int" else lcm(columns, NF_BLOCK) // columns


def split_groups(x: Tensor, weight_format: WeightFormat) -> Tensor:
    """x [R, I] as groups [periods, groups in a period, group size], padded with zeros."""
    rows, columns = x.shape
    if weight_format.kind == "int":
        size = min(weight_format.group_size or columns, columns)
        return F.pad(x, (0, -columns % size)).view(rows, -1, size)
    period = lcm(columns, NF_BLOCK)
    return F.pad(x.flatten(), (0, -x.numel() % period)).view(-1, period // NF_BLOCK, NF_BLOCK)


def join_groups(groups: Tensor, shape: Sequence[int], weight_format: WeightFormat) -> Tensor:
    """The inverse of `split_groups`: the weight [R, I] of this shape, without padding."""
    rows, columns = shape
    if weight_format.kind == "int":
        return groups.reshape(rows, -1)[:, :columns]
    return groups.flatten()[: rows * columns].view(rows, columns)
