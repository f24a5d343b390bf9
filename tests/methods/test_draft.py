import pytest
import torch
from searching import context_of
from stored_codes import other_parameters

from qvlm_plugin.methods.draft import Draft, build_plan, transformed, transformed_gradient
from qvlm_plugin.plan_header import Fold
from qvlm_plugin.rotation import rotation_of


@pytest.fixture
def context(loaded):
    return context_of(loaded, scheme="w4a16", group_size=16)


@pytest.fixture
def names(context):
    """Of the Linears of two sites."""
    return [site.name for site in context.sites if site.part == "decoder"][:2]


def test_weights_with_codes_among_the_tensors_are_stored(context, names):
    tensors = {
        f"{name}/{key}": tensor
        for name in names
        for key, tensor in other_parameters(
            context.model.get_submodule(name).weight.detach(), context.options.weight_format(4)
        ).items()
    }
    plan = build_plan(context, Draft(tensors))
    assert {module.name for module in plan.modules if module.weight.stored} == set(names)
    clipped = Draft({f"{name}/clip": torch.ones(1) for name in (*names, "other")})
    assert set(clipped.with_codes(tensors).tensors) == {*tensors, "other/clip"}


def test_rotations_pass_through(context, names):
    rotations = tuple(rotation_of(name, 24, seed) for seed, name in enumerate(names))
    assert build_plan(context, Draft(rotations=rotations)).rotations == rotations


def test_a_draft_is_stored_and_restored(names):
    draft = Draft(
        {"x/lower": torch.ones(3)}, (Fold(site=names[0], producer="norm"),), ("norm.weight",),
        (rotation_of(names[1], 24, 5),), {"cdm": {"blocks": [1]}}, [[torch.zeros(2)], [torch.ones(2)]],
    )  # fmt: skip
    again = Draft.restored(*draft.stored())
    assert (again.folds, again.replaced, again.rotations) == (draft.folds, draft.replaced, draft.rotations)
    assert again.record == draft.record and torch.equal(again.tensors["x/lower"], draft.tensors["x/lower"])
    assert [[float(tensor.sum()) for tensor in layer] for layer in again.token_weights] == [[0], [2]]
    assert set(again.tensors) == {"x/lower"} and Draft.restored(*Draft().stored()).token_weights is None


def test_what_is_transformed_has_the_gradient_of_what_it_stands_for(context, names):
    """An inner product of a gradient and a small step is the same before and after."""
    site = next(site for site in context.sites if site.name == names[0])
    channels = context.model.get_submodule(site.name).in_features
    torch.manual_seed(0)
    scale, rotation = torch.rand(channels) + 0.5, rotation_of(site.name, channels, 3)
    fold = Fold(site=site.name, producer=site.producer)
    draft = Draft({f"{site.name}/scale": scale}, (fold,), rotations=(rotation,))
    step, gradient = torch.randn(2, 7, channels)
    inner = (transformed(draft, site, step) * transformed_gradient(draft, site, gradient)).sum()
    assert float(inner) == pytest.approx(float((step * gradient).sum()), rel=1e-4)
    assert not torch.allclose(transformed(draft, site, step), step)
