"""Cross-layer dependency: the conditional entropy of a layer's quantized output given that of the layer before it.

Paper, section 3.2, Eq. 4-6. Rounding is approximated by a soft assignment to the rounding points, which makes
everything here differentiable. Entropies are in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qvlm_plugin.methods.options import MiningOptions
from qvlm_plugin.quantizers import widen

CHUNK = 2**22
"""Soft assignments (elements x rounding points) computed at a time."""

MAX_ELEMENTS = 2**20
"""Maximum number of elements from which a dependency is estimated; larger outputs are sampled. The histogram of 4-bit
codes has 256 cells."""

_HARD = 1e4  # exp(-1e4) is 0 in every floating-point type


@dataclass(frozen=True)
class Assignment:
    """How elements are assigned to rounding points.

    Attributes:
        bits: 2 to 8.
        literal: divide the squared distance in x by the step, as printed; see `soft_assignment`.
    """

    bits: int
    literal: bool = False

    @classmethod
    def of(cls, options: MiningOptions, bits: int) -> "Assignment":
        """That of a search's options."""
        return cls(bits, options.assignment == "literal")


def soft_assignment(x: Tensor, lower: Tensor, upper: Tensor, assignment: Assignment) -> Tensor:
    """Probability of each rounding point for each element (Eq. 5): p(m) ∝ exp(-(u - m)^2).

    ``u = (x - lower) / step`` is the element in code units, which makes the formula independent of the scale of x. The
    printed formula divides the squared distance in x by the step, which is (u - m)^2 times the step (``literal``).

    Args:
        x: any shape.
        lower, upper: bounds that broadcast against x. Where they coincide, code 0 is the only rounding point and has
            probability 1.
        assignment: see `Assignment`.

    Returns:
        [..., 2^bits], sums to 1 along the last dimension; float32, or float64 for float64 x.
    """
    x, lower, upper = widen(x), widen(lower), widen(upper)
    step = (upper - lower) / (2**assignment.bits - 1)
    constant = step <= 0
    u = torch.where(constant, 0, (x - lower) / torch.where(constant, 1, step))
    sharpness = torch.where(constant, _HARD, step if assignment.literal else 1)
    points = torch.arange(2**assignment.bits, device=x.device, dtype=u.dtype)
    return (-(u.unsqueeze(-1) - points).square() * sharpness.unsqueeze(-1)).softmax(dim=-1)


def joint_counts(
    x: Tensor, y: Tensor, x_bounds: tuple[Tensor, Tensor], y_bounds: tuple[Tensor, Tensor], assignment: Assignment
) -> Tensor:
    """Sum over elements of p_x(m) p_y(m'): the joint histogram of the codes. Histograms of several batches add up.

    Args:
        x, y: outputs of two layers, of the same shape.
        x_bounds, y_bounds: (lower, upper) of each, which broadcast against it.
        assignment: see `Assignment`.

    Returns:
        float64 [2^bits, 2^bits], differentiable in x and y; memory is bounded in both passes.
    """

    def count(x: Tensor, *others: Tensor) -> Tensor:
        x_lower, x_upper, y, y_lower, y_upper = others
        rows = soft_assignment(x, x_lower, x_upper, assignment)
        columns = soft_assignment(y, y_lower, y_upper, assignment)
        return (rows.T @ columns).double()

    points = 2**assignment.bits
    columns = [tensor.expand_as(x).flatten().split(CHUNK // points) for tensor in (x, *x_bounds, y, *y_bounds)]
    differentiable = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    total = torch.zeros(points, points, dtype=torch.float64, device=x.device)
    for chunk in zip(*columns, strict=True):
        # The backward pass computes a chunk's assignments again instead of keeping them.
        total = total + (checkpoint(count, *chunk, use_reentrant=False) if differentiable else count(*chunk))
    return total


def conditional_entropy(joint: Tensor) -> Tensor:
    """H(column | row) of a joint histogram (Eq. 4: rows are codes of layer k, columns those of layer k + 1).

    Args:
        joint: [M, M], not negative, with any positive sum.

    Returns:
        A scalar in nats, from 0 to log M.
    """
    joint = joint / joint.sum()
    tiny = torch.finfo(joint.dtype).tiny
    # Only the logarithm's argument is clamped: an empty cell adds 0, and its gradient is finite.
    given = joint.clamp_min(tiny).log() - joint.sum(dim=1, keepdim=True).clamp_min(tiny).log()
    return -(joint * given).sum()


@dataclass(frozen=True, eq=False)
class Ranged:
    """A tensor that is rounded, and the bounds of its rounding points.

    Attributes:
        states: [N, C].
        lower, upper: [C] or [N, 1].
    """

    states: Tensor
    lower: Tensor
    upper: Tensor

    @classmethod
    def by_extremes(cls, states: Tensor) -> "Ranged":
        """The states with each channel's extremes as its bounds."""
        return cls(states, *states.aminmax(dim=0))

    def to(self, device: torch.device) -> "Ranged":
        """The tensor and its bounds on a device."""
        return Ranged(*(tensor.to(device) for tensor in (self.states, self.lower, self.upper)))

    def elements(self, chosen: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The elements at these positions in the flattened states, and their bounds."""
        row, column = chosen // self.states.shape[1], chosen % self.states.shape[1]
        bounds = (bound[column] if bound.dim() == 1 else bound[row, 0] for bound in (self.lower, self.upper))
        return self.states[row, column], tuple(bounds)


def layer_dependency(x: Ranged, y: Ranged, assignment: Assignment, seed: int = 0) -> float:
    """D(k, k+1) of two layers (Eq. 4), from all of their elements or a sample of `MAX_ELEMENTS`.

    Args:
        x, y: tensors of layer k and of layer k + 1, with the same shape and device.
        assignment: see `Assignment`.
        seed: seed of the sample.
    """
    chosen = sample_elements(x.states.numel(), MAX_ELEMENTS, seed).to(x.states.device)
    (first, first_bounds), (second, second_bounds) = x.elements(chosen), y.elements(chosen)
    return float(conditional_entropy(joint_counts(first, second, first_bounds, second_bounds, assignment)))


def sample_elements(total: int, count: int, seed: int) -> Tensor:
    """Positions of ``count`` random elements of ``total``, with replacement; all of them if there are no more."""
    if total <= count:
        return torch.arange(total)
    return torch.randint(total, (count,), generator=torch.Generator().manual_seed(seed))


def dependency_between(steps: Sequence[float], first: int, last: int) -> float:
    """D(first, last) of layers further apart (Eq. 6): the sum over the steps between them.

    Args:
        steps: D(k, k+1) of all consecutive layers, from layer 0.
        first, last: layers, first <= last.
    """
    return sum(steps[first:last])
