from dataclasses import replace

import pytest
import torch
from searching import context_of

from qvlm_plugin import planning
from qvlm_plugin.conversation import to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods import importance
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.importance import by_modality, log_odds, search_important_ranges, visit_jacobians
from qvlm_plugin.methods.lp import least_distance
from qvlm_plugin.observers import ChannelStatistics, RangeGrid, channel_lp_losses
from qvlm_plugin.plan_header import Fold
from qvlm_plugin.plan_request import check_request


def decoder_sites(context):
    return [site for site in context.sites if site.part == "decoder"]


def seen_by(context, sites):
    """Inputs and Jacobians by site, of the first batch."""
    seen = {}

    def visit(site, x, jacobian, batch):
        seen.setdefault(site, (x, jacobian))
        return torch.zeros(1)

    visit_jacobians(context, sites, visit)
    return seen


def test_log_odds_are_those_of_the_softmax():
    torch.manual_seed(0)
    logits, tokens = torch.randn(7, 11, dtype=torch.float64, requires_grad=True), torch.randint(11, (7,))
    p = logits.softmax(dim=1)[torch.arange(7), tokens]
    assert torch.allclose(log_odds(logits, tokens), (p / (1 - p)).log())
    assert torch.autograd.gradcheck(lambda logits: log_odds(logits, tokens), logits)


def test_log_odds_of_a_sure_token_still_have_a_gradient():
    logits = torch.tensor([[90.0, 0.0, -1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(log_odds(logits, torch.tensor([0])).sum(), logits)
    assert gradient[0, 0] == 1 and gradient[0, 1:].sum() == pytest.approx(-1)


def odds_of(loaded, inputs, answer):
    logits = loaded.model(**to_device(inputs, loaded.model.device, loaded.model.dtype), use_cache=False).logits[:, :-1]
    said = answer[:, 1:]
    return float(log_odds(logits[said].double(), inputs["input_ids"][:, 1:][said]).sum())


def test_jacobians_are_finite_differences_of_the_log_odds(loaded, calibration):
    loaded.model.double()
    context = context_of(loaded, calibration, calibration_batch_size=5)
    sites = decoder_sites(context)
    seen = seen_by(context, sites)
    assert list(seen) == sites[::-1]
    ((inputs, answer),) = calibration.batches(loaded.processor, 5)
    attended = inputs["attention_mask"].bool()
    torch.manual_seed(0)
    for site in sites:
        x, jacobian = seen[site]
        step = torch.randn_like(x) * 1e-3

        def moved(module, args, site_step=step, sign=1):
            states = args[0].clone()
            states[attended] += sign * site_step
            return (states,)

        values = []
        for sign in (1, -1):
            handles = [
                loaded.model.get_submodule(name).register_forward_pre_hook(
                    lambda module, args, sign=sign: moved(module, args, sign=sign)
                )
                for name in site.linears
            ]
            with torch.no_grad():
                values.append(odds_of(loaded, inputs, answer))
            for handle in handles:
                handle.remove()
        assert (values[0] - values[1]) / 2 == pytest.approx(float((step * jacobian).sum()), rel=1e-2)


def test_token_weights_are_the_squared_jacobians_of_layer_outputs(loaded, calibration):
    loaded.model.double()
    context = context_of(loaded, calibration)
    found, weights = visit_jacobians(context, decoder_sites(context), lambda *_: torch.ones(1))
    assert set(found) == set(decoder_sites(context)) and all(total == 3 for total in found.values())  # batches
    assert [[len(batch) for batch in layer] for layer in weights] == [[2, 2, 1]] * 2
    inputs, answer = next(calibration.batches(loaded.processor, 2))
    outputs = []
    for layer in loaded.model.model.language_model.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = loaded.model(**to_device(inputs, loaded.model.device, torch.float64), use_cache=False).logits[:, :-1]
    odds = log_odds(logits[answer[:, 1:]], inputs["input_ids"][:, 1:][answer[:, 1:]]).sum()
    for layer, gradient in zip(weights, torch.autograd.grad(odds, outputs), strict=True):
        assert torch.allclose(layer[0].double(), gradient.square().sum(dim=-1), rtol=1e-4)


def hooks_of(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]


def test_the_pass_leaves_the_model_as_it_was(loaded, calibration):
    context = context_of(loaded, calibration)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    seen_by(context, decoder_sites(context))
    hooks = hooks_of(loaded.model)  # transformers adds some of its own at the first call
    seen_by(context, decoder_sites(context))
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in loaded.model.parameters())
    assert hooks_of(loaded.model) == hooks


def test_equal_weights_give_the_layer_wise_search_of_channels(loaded, calibration, monkeypatch):
    context = context_of(loaded, calibration, "w4a3", observer="lp", ranges="channel")
    formats = {site: fmt for site, fmt in context.activation_sites.items() if site.part == "decoder"}
    expected = least_distance(context, Draft(), formats)
    monkeypatch.setattr(
        importance,
        "channel_lp_losses",
        lambda x, seen, grid, weights: channel_lp_losses(x, seen, grid, torch.ones_like(weights)),
    )
    found = search_important_ranges(context, Draft()).tensors
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_token_that_no_answer_depends_on_does_not_widen_the_range():
    torch.manual_seed(0)
    x = torch.randn(500, 1)
    x[0] = 40
    weights = torch.ones_like(x)
    ratios = (1.0, 0.1)
    assert channel_lp_losses(x, ChannelStatistics.of(x), RangeGrid(ratios, 4, 2.0), weights).argmin() == 0
    weights[0] = 0
    assert channel_lp_losses(x, ChannelStatistics.of(x), RangeGrid(ratios, 4, 2.0), weights).argmin() == 1


@pytest.mark.parametrize("observed", [True, False], ids=["sites", "layers alone"])
def test_jacobians_that_are_not_finite_name_the_layer(loaded, calibration, observed):
    context = context_of(loaded, calibration)
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(QVLMError, match="the output of layer 1 is not finite"):
        seen_by(context, decoder_sites(context) if observed else [])


@pytest.mark.parametrize("observed", [True, False], ids=["sites", "layers alone"])
def test_gradients_that_overflow_are_taken_again_with_a_smaller_scale(loaded, calibration, monkeypatch, observed):
    context = context_of(loaded, calibration)
    sites = decoder_sites(context) if observed else []
    expected, weights = visit_jacobians(context, sites, lambda site, x, j, batch: j.square().sum())
    layer, scales = loaded.model.model.language_model.layers[0], []

    def narrow(gradient):
        """As float16 does, at a bound that the third scale keeps."""
        scales.append(float(gradient.abs().max()))
        return torch.where(gradient.abs() > scales[0] / 10, float("inf"), gradient)

    layer.register_forward_hook(lambda module, args, output: output.register_hook(narrow) and None)
    found, other = visit_jacobians(context, sites, lambda site, x, j, batch: j.square().sum())
    assert len(scales) > 3 and scales[1] == pytest.approx(scales[0] / 4) and scales[2] == pytest.approx(scales[0] / 16)
    assert all(torch.equal(found[site], value) for site, value in expected.items())
    assert all(
        torch.equal(a, b) for one, two in zip(weights, other, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_transformed_inputs_have_the_jacobians_of_what_they_stand_for(loaded, calibration, monkeypatch):
    """A ratio is searched on x/s with the Jacobian s·∂m/∂x: scales that are equal in a channel change no choice."""
    context = context_of(loaded, calibration, "w4a3", observer="lp", importance="jacobian")
    plain = search_important_ranges(context, Draft())
    site = next(site for site in decoder_sites(context) if site.producer)
    scale = torch.full((loaded.model.get_submodule(site.name).in_features,), 4.0)
    fold = Fold(site=site.name, producer=site.producer)
    scaled = search_important_ranges(context, Draft({f"{site.name}/scale": scale}, (fold,)))
    for bound in ("lower", "upper"):
        assert torch.allclose(scaled.tensors[f"{site.name}/{bound}"] * 4, plain.tensors[f"{site.name}/{bound}"])


def test_modalities_are_balanced_by_their_gradients():
    """The ratio of mean norms, at least its median over layers; padding counts nowhere."""
    images = [torch.tensor([[1, 1, 0, 0, 0]]).bool(), torch.tensor([[0, 1, 0, 0, 0]]).bool()]
    texts = [torch.tensor([[0, 0, 1, 1, 0]]).bool(), torch.tensor([[0, 0, 1, 1, 1]]).bool()]
    layers = []
    for image, text in ((4.0, 2.0), (3.0, 1.0), (1.0, 4.0)):
        norms = [
            torch.where(one, image, torch.where(other, text, 77.0)) for one, other in zip(images, texts, strict=True)
        ]
        layers.append([norm.square() for norm in norms])
    found = by_modality(layers, images, texts)
    for layer, ratio in zip(found, (2.0, 3.0, 2.0), strict=True):  # the last one's own is a quarter
        for weights, image, text in zip(layer, images, texts, strict=True):
            assert torch.allclose(weights[image], torch.tensor(ratio)) and (weights[text] == 1).all()


def test_token_weights_are_found_before_weights_are_searched(loaded, calibration):
    """MBQ's balance changes AWQ's choices, the Jacobian GPTQ's; uniform weights change nothing."""
    for method, choices in (("mbq", ("uniform", "modality")), ("gptq", ("uniform", "jacobian", "modality"))):
        options = {"calibration_batch_size": 5, "group_size": 16, **({"alpha_steps": 6} if method == "mbq" else {})}
        plans = []
        for choice in choices:
            request = check_request(method, "w3a16", options | {"importance": choice})
            plans.append(planning.obtain_plan(loaded, request, calibration, None))
        assert len({plan.hash for plan in plans}) == len(choices)


def test_modalities_need_answers(loaded, calibration):
    unanswered = replace(calibration, samples=tuple(replace(one, answer="") for one in calibration.samples))
    request = check_request("mbq", "w4a16", {"calibration_batch_size": 5})
    with pytest.raises(QVLMError, match="importance=modality; choose a split with answers"):
        planning.obtain_plan(loaded, request, unanswered, None)
