import itertools
import math

import pytest
import torch

from qvlm_plugin.methods.qvlm import dependency
from qvlm_plugin.methods.qvlm.dependency import (
    Assignment,
    Ranged,
    conditional_entropy,
    dependency_between,
    joint_counts,
    layer_dependency,
    soft_assignment,
)
from qvlm_plugin.quantizers import fake_quantize

HARD = 1e6
"""Scale of x at which the literal assignment is rounding to nearest."""


def extremes(x):
    return tuple(x.aminmax(dim=0))


def dependency_of(x, y, how, seed=0):
    """Each channel within its extremes."""
    return layer_dependency(Ranged.by_extremes(x), Ranged.by_extremes(y), how, seed)


def outputs(tokens=40, channels=3, seed=0, dtype=torch.float64):
    """Outputs of two layers that depend on each other, with channels of different scales."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator, dtype=dtype) * torch.tensor([0.1, 1.0, 30.0])[:channels]
    return x, 0.7 * x + 0.3 * x.abs().sqrt() * torch.randn(tokens, channels, generator=generator, dtype=dtype)


def brute_force(x, y, bits, literal=False):
    """Eq. 4 and 5 as they are written, element by element."""
    points = range(2**bits)
    joint = dict.fromkeys(itertools.product(points, points), 0.0)

    def assignment(value, channel):
        lower, upper = float(channel.min()), float(channel.max())
        step = (upper - lower) / (2**bits - 1)
        weights = []
        for m in points:
            squared = (value - (lower + m * step)) ** 2
            weights.append(math.exp(-squared / (step if literal else step**2)))
        return [weight / sum(weights) for weight in weights]

    for i, j in itertools.product(range(x.shape[0]), range(x.shape[1])):
        p = assignment(float(x[i, j]), x[:, j]), assignment(float(y[i, j]), y[:, j])
        for m, n in joint:
            joint[m, n] += p[0][m] * p[1][n] / x.numel()
    given = {m: sum(joint[m, n] for n in points) for m in points}
    return -sum(p * math.log(p / given[m]) for (m, n), p in joint.items() if p > 0)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_it_agrees_with_the_equations_element_by_element(bits, literal):
    x, y = outputs()
    expected = brute_force(x, y, bits, literal)
    assert dependency_of(x, y, Assignment(bits, literal)) == pytest.approx(expected, rel=1e-9)


def test_assignments_are_probabilities_that_harden_to_rounding():
    x, _ = outputs()
    lower, upper = extremes(x)
    soft = soft_assignment(x * 1.2, lower, upper, Assignment(4))  # beyond the bounds too
    assert torch.allclose(soft.sum(-1), torch.ones_like(x)) and (soft >= 0).all()
    codes = ((fake_quantize(x, lower, upper, 4) - lower) / ((upper - lower) / 15)).round()
    assert torch.equal(soft_assignment(x, lower, upper, Assignment(4)).argmax(-1), codes.long())
    hard = soft_assignment(HARD * x, HARD * lower, HARD * upper, Assignment(4, literal=True))
    assert torch.equal(hard.argmax(-1), codes.long()) and hard.amax(-1).min() > 0.99


def test_the_scale_of_a_channel_matters_only_as_printed():
    x, y = outputs()
    for literal in (False, True):
        same = dependency_of(x * 50 + 7, y / 9, Assignment(3, literal)) == pytest.approx(
            dependency_of(x, y, Assignment(3, literal))
        )
        assert same != literal


def test_constant_channels_have_one_rounding_point():
    x = torch.full((5, 2), 3.0)
    for literal in (False, True):
        p = soft_assignment(x + torch.tensor([0.0, 9.0]), x[0], x[0], Assignment(4, literal))
        assert torch.equal(p[..., 0], torch.ones(5, 2)) and not p[..., 1:].any()
        assert dependency_of(x, x, Assignment(4, literal)) == 0


@pytest.mark.parametrize("scale, how", [(1.0, Assignment(3)), (HARD, Assignment(3, literal=True))])
def test_independent_layers_leave_the_whole_entropy(scale, how):
    a, b = scale * torch.randn(7, dtype=torch.float64), scale * torch.randn(9, dtype=torch.float64)
    grid = torch.cartesian_prod(a, b)  # every pair once: exactly independent
    x, y = grid[:, :1], grid[:, 1:]
    marginal = soft_assignment(y, *extremes(y), how).flatten(0, -2).mean(0)
    entropy = float(torch.special.entr(marginal).sum())
    assert dependency_of(x, y, how) == pytest.approx(entropy)


def test_a_copy_leaves_nothing_when_assignment_is_hard():
    x, y = outputs(tokens=200)
    literal = Assignment(3, literal=True)
    assert dependency_of(HARD * x, HARD * x, literal) < 0.01
    assert dependency_of(HARD * x, HARD * y, literal) > 0.2
    soft = [dependency_of(scale * x, scale * x, literal) for scale in (1e3, 1e2, 1e1)]
    assert soft == sorted(soft)


def test_batches_add_up_and_chunks_do_not_show(monkeypatch):
    x, y = outputs()
    bounds = extremes(x), extremes(y)
    whole = joint_counts(x, y, *bounds, Assignment(3))
    halves = joint_counts(x[:11], y[:11], *bounds, Assignment(3)) + joint_counts(x[11:], y[11:], *bounds, Assignment(3))
    assert torch.allclose(whole, halves) and whole.sum() == pytest.approx(x.numel())
    x.requires_grad_(), y.requires_grad_()
    gradients = torch.autograd.grad(conditional_entropy(joint_counts(x, y, *bounds, Assignment(3))), (x, y))
    monkeypatch.setattr(dependency, "CHUNK", 8 * 13)
    chunked = joint_counts(x, y, *bounds, Assignment(3))
    assert torch.allclose(chunked, whole)
    for one, other in zip(gradients, torch.autograd.grad(conditional_entropy(chunked), (x, y)), strict=True):
        assert torch.allclose(one, other) and one.abs().max() > 0


@pytest.mark.parametrize("literal", [False, True])
def test_gradients_match_finite_differences(literal):
    x, y = outputs(tokens=6)
    bounds = extremes(x), extremes(y)
    a, b = (0.9 * x).requires_grad_(), (0.9 * y).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: conditional_entropy(joint_counts(a, b, *bounds, Assignment(2, literal))), (a, b)
    )


def test_gradients_stay_finite_where_cells_are_empty():
    x = torch.zeros(4, 1, requires_grad=True)
    bounds = torch.zeros(1), torch.ones(1) * 1000
    (gradient,) = torch.autograd.grad(conditional_entropy(joint_counts(x, x, bounds, bounds, Assignment(8))), x)
    assert gradient.isfinite().all()


def test_a_sample_estimates_large_outputs(monkeypatch):
    x, y = outputs(tokens=20000)
    whole = dependency_of(x, y, Assignment(3))
    monkeypatch.setattr(dependency, "MAX_ELEMENTS", 20000)
    sampled = dependency_of(x, y, Assignment(3), seed=1)
    assert sampled == pytest.approx(whole, abs=0.02) and sampled == dependency_of(x, y, Assignment(3), seed=1) != whole


def test_half_precision_outputs_are_widened():
    x, y = outputs(dtype=torch.float32)
    half = dependency_of(x.half(), y.half(), Assignment(4))
    assert half == pytest.approx(dependency_of(x, y, Assignment(4)), abs=0.01)


def test_layers_further_apart_add_the_steps_between():
    steps = [0.5, 1.0, 2.0]
    assert [dependency_between(steps, 0, k) for k in range(4)] == [0, 0.5, 1.5, 3.5]
    assert dependency_between(steps, 1, 3) == 3.0


def test_bounds_of_tokens_are_those_of_their_elements():
    """Tokens within their own extremes are channels within theirs, turned."""
    x, y = (states.T.contiguous() for states in outputs())
    by_token = [Ranged(states, *(bound[:, None] for bound in states.aminmax(dim=1))) for states in (x, y)]
    assert layer_dependency(*by_token, Assignment(3)) == pytest.approx(dependency_of(x.T, y.T, Assignment(3)))
