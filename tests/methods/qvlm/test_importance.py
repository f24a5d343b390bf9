import pytest
import torch

from qvlm_plugin import plugins
from qvlm_plugin.conversation import to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.build import activation_sites
from qvlm_plugin.methods.options import RangeSearchOptions
from qvlm_plugin.methods.qlora import search_ranges
from qvlm_plugin.methods.qvlm import importance
from qvlm_plugin.methods.qvlm.importance import log_odds, search_important_ranges, visit_jacobians
from qvlm_plugin.observers import ChannelStatistics, channel_lp_losses
from qvlm_plugin.scheme import Scheme
from qvlm_plugin.topology import resolve


def decoder_sites(loaded):
    topology = plugins.topology(loaded.model.config)
    return topology, [site for site in resolve(topology, loaded.model) if site.part == "decoder"]


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
    topology, sites = decoder_sites(loaded)
    seen = {}
    visit_jacobians(
        loaded, topology, sites, calibration, 5, lambda site, x, jacobian: seen.update({site: (x, jacobian)})
    )
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
    topology, sites = decoder_sites(loaded)
    weights = visit_jacobians(loaded, topology, sites, calibration, 2, lambda *_: None)
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
    topology, sites = decoder_sites(loaded)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    visit_jacobians(loaded, topology, sites, calibration, 2, lambda *_: None)
    hooks = hooks_of(loaded.model)  # transformers adds some of its own at the first call
    visit_jacobians(loaded, topology, sites, calibration, 2, lambda *_: None)
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in loaded.model.parameters())
    assert hooks_of(loaded.model) == hooks


def test_equal_weights_give_the_layer_wise_search_of_channels(loaded, calibration, monkeypatch):
    topology, sites = decoder_sites(loaded)
    options = RangeSearchOptions(ranges="channel", calibration_batch_size=2)
    formats = [pair for pair in activation_sites(topology, loaded, Scheme.parse("w4a3")) if pair[0] in sites]
    expected = search_ranges(loaded, formats, calibration, options)
    monkeypatch.setattr(
        importance,
        "channel_lp_losses",
        lambda x, seen, ratios, bits, p, weights: channel_lp_losses(x, seen, ratios, bits, p, torch.ones_like(weights)),
    )
    found, _ = search_important_ranges(loaded, topology, sites, 3, calibration, options)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_token_that_no_answer_depends_on_does_not_widen_the_range():
    torch.manual_seed(0)
    x = torch.randn(500, 1)
    x[0] = 40
    weights = torch.ones_like(x)
    ratios = (1.0, 0.1)
    assert channel_lp_losses(x, ChannelStatistics.of(x), ratios, 4, 2.0, weights).argmin() == 0
    weights[0] = 0
    assert channel_lp_losses(x, ChannelStatistics.of(x), ratios, 4, 2.0, weights).argmin() == 1


def test_jacobians_that_are_not_finite_name_the_site(loaded, calibration):
    topology, sites = decoder_sites(loaded)
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(QVLMError, match=sites[-1].name):
        visit_jacobians(loaded, topology, sites, calibration, 2, lambda *_: None)
