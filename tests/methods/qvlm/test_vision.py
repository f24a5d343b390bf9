import dataclasses
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from searching import context_of
from tiny_llava import random_image
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qvlm_plugin import backends, quantizers
from qvlm_plugin.calibration import CalibrationSet, Sample
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.kernels.reference import STRAIGHT_THROUGH
from qvlm_plugin.methods.draft import Draft, build_plan
from qvlm_plugin.methods.footprint import Footprint
from qvlm_plugin.methods.gradients import checkpointed
from qvlm_plugin.methods.hidden import block_inputs, quantized_inputs
from qvlm_plugin.methods.minmax import observe_extremes
from qvlm_plugin.methods.qvlm import objective as objectives
from qvlm_plugin.methods.qvlm import vision
from qvlm_plugin.methods.qvlm.dependency import Assignment
from qvlm_plugin.methods.qvlm.objective import (
    Objective,
    answer_loss,
    entropy_loss,
    jacobian_weights,
    relative_error,
)
from qvlm_plugin.methods.qvlm.vision import train_tower
from qvlm_plugin.methods.replacements import quantized_modules, replaced
from qvlm_plugin.methods.smooth import smooth
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import apply_plan
from qvlm_plugin.workspace import Workspace

FAST = {"calibration_batch_size": 2, "veo_epochs": 2, "veo_clip_rate": 0.02}
SITES = 8  # two vision blocks of four sites reach the feature layer


@pytest.fixture
def calibration():
    """Five samples with images, in two batches of two and one of one."""
    samples = (
        Sample(Conversation.from_prompt(f"what is {i}?" * (i + 1), [random_image(i)]), f"answer {i}") for i in range(5)
    )
    return CalibrationSet(tuple(samples))


def initial_of(loaded, calibration, scheme):
    """Min/max parameters of every site, as plan tensors."""
    return dict(observe_extremes(context_of(loaded, calibration, scheme), Draft()).tensors)


@dataclasses.dataclass
class Result:
    """What training added to the draft."""

    draft: Draft
    initial: dict

    @property
    def tensors(self):
        return {k: v for k, v in self.draft.tensors.items() if k not in self.initial or v is not self.initial[k]}

    @property
    def replaced(self):
        return self.draft.replaced

    @property
    def record(self):
        return self.draft.record["veo"]

    def __getattr__(self, name):
        return self.record[name]


def optimize(loaded, calibration, scheme="w3a3", initial=None, workspace=None, footprint=None, draft=None, **options):
    draft = draft or Draft(initial or initial_of(loaded, calibration, scheme))
    context = context_of(loaded, calibration, scheme, **FAST | options)
    context = dataclasses.replace(context, workspace=workspace or Workspace(), footprint=footprint or Footprint())
    return Result(train_tower(context, draft), draft.tensors)


def improved(result):
    return result.after["total"] < result.before["total"]


# The terms


def test_the_answer_loss_is_the_cross_entropy_of_the_answers_alone():
    torch.manual_seed(0)
    ids = torch.randint(11, (2, 6))
    answer = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]).bool()
    logits = torch.randn(2, 4, 11, dtype=torch.float64, requires_grad=True)
    expected = [F.log_softmax(logits[row, 3 - 6 + t], -1)[ids[row, t]] for row, t in answer.nonzero().tolist()]
    assert torch.allclose(answer_loss(logits, ids, answer), -sum(expected) / 5)
    assert torch.autograd.gradcheck(lambda logits: answer_loss(logits, ids, answer), logits)


def test_entropy_and_errors_have_the_gradients_of_finite_differences():
    torch.manual_seed(0)
    layers = [torch.randn(9, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bounds = [(layer.detach().min() * 1.1, layer.detach().max() * 1.1) for layer in layers]
    weights = torch.tensor([0.2, 0.8], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *layers: entropy_loss(layers, bounds, weights, Assignment(2)), layers)
    reference = torch.randn(9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: relative_error(x, reference), layers[0])


def test_entropies_are_weighted_by_layer():
    torch.manual_seed(0)
    layers = list(torch.randn(3, 50))
    bounds = [tuple(layer.aminmax()) for layer in layers]
    first, second = (
        float(entropy_loss(layers, bounds, torch.tensor(w), Assignment(3))) for w in ([1.0, 0.0], [0.0, 1.0])
    )
    mixed = float(entropy_loss(layers, bounds, torch.tensor([0.25, 0.75]), Assignment(3)))
    assert mixed == pytest.approx(0.25 * first + 0.75 * second) and first != pytest.approx(second)
    assert 0 < first < math.log(8)


def test_errors_are_relative():
    x = torch.randn(4, 3)
    assert relative_error(1.1 * x, x) == pytest.approx(0.1, rel=1e-4) and relative_error(x, x) == 0
    assert relative_error(torch.zeros(4, 3), 1e3 * x) == pytest.approx(1)


def test_layer_weights_are_norms_of_the_jacobian_that_sum_to_one():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    layers = [3 * x]
    layers.append(layers[0].square())
    layers.append(layers[1].sum())
    error = layers[2].square()  # s = sum(y), y = z², so dE/dy = 2s and dE/dz = 2s · 2z
    s, z = 45.0, torch.tensor([3.0, 6.0])
    expected = torch.stack([(4 * s * z).norm(), torch.full((2,), 2 * s).norm()])
    assert torch.allclose(jacobian_weights(error, layers).float(), expected / expected.sum())
    flat = [3 * x, 2 * x, 4 * x]
    assert jacobian_weights(0 * sum(layer.sum() for layer in flat), flat).tolist() == [0.5, 0.5]


# The objective on a model


def test_weighted_layers_are_those_whose_dependency_is_measured(loaded, calibration):
    """Inputs of layers for codes of sites, outputs for codes of outputs; then D(k, k+1) begins at x^(k) (Eq. 8)."""
    states = {}
    for dependency in ("site", "output"):
        context = context_of(loaded, calibration, "w3a3", **FAST, dependency=dependency)
        inputs, answer = next(iter(context.batches("full precision")))
        states[dependency] = objectives.run(context, inputs, answer)
    assert torch.equal(states["site"].layers[1], states["output"].layers[0])
    norm = loaded.model.model.language_model.layers[0].input_layernorm
    assert torch.equal(norm(states["site"].layers[0]), states["site"].reads[0])  # what the first site rounds


@pytest.mark.parametrize("assignment", ["steps", "literal"])
def test_the_entropy_term_is_the_sum_over_layers_with_the_assignment_asked_for(loaded, calibration, assignment):
    context = context_of(loaded, calibration, "w3a3", **FAST, dependency="output", assignment=assignment)
    objective = Objective.of(context, Draft(initial_of(loaded, calibration, "w3a3")))
    batch, weights = objective.batches[0], torch.ones(1)
    layers = objectives.run(context, batch.inputs, batch.answer).layers
    drawn = [layer.flatten()[batch.elements] for layer in layers]
    channels = batch.elements % layers[0].shape[-1]
    bounds = [(lower[channels], upper[channels]) for lower, upper in objective.bounds]
    how = Assignment(3, literal=assignment == "literal")
    expected = entropy_loss(drawn, bounds, weights, how)
    assert float(objective.terms(batch, weights).ent) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("decoder", ["quantized", "full"])
def test_gradients_on_the_model_match_finite_differences(loaded, calibration, decoder, monkeypatch):
    """Rounding replaced by the identity, which is what the straight-through estimator differentiates."""
    monkeypatch.setattr(quantizers, "straight_through_round", lambda x: x)
    initial = initial_of(loaded, calibration, "w3a3")
    initial |= {key: torch.tensor([0.75]) for key in initial if key.endswith("clip_ratio")}
    loaded.model.double()
    for norm in (module for module in loaded.model.modules() if isinstance(module, LlamaRMSNorm)):
        # Its own forward computes in float32, too coarse to take differences of.
        norm.forward = partial(F.rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=1e-6)
    context = context_of(loaded, calibration, "w3a3", **FAST, veo_decoder=decoder)
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model")
    plan = build_plan(context, Draft({name: tensor.clone() for name, tensor in initial.items()}))
    others = quantized_modules(plan, loaded.model, STRAIGHT_THROUGH, parts if decoder == "quantized" else parts[:2])
    objective = Objective.of(context, Draft(initial))
    block = "model.vision_tower.encoder.layers.0"
    with replaced(loaded.model, others), checkpointed(vision._blocks(context)):
        parameters = {
            "fc1": others.linears[f"{block}.mlp.fc1"].clip_ratio,
            "out": others.linears[f"{block}.self_attn.out_proj"].clip_ratio,
            "norm": loaded.model.get_parameter(f"{block}.layer_norm2.weight"),
        }
        for parameter in parameters.values():
            parameter.data = parameter.data.double()
            parameter.requires_grad_()
        batch = objective.batches[1]
        weights = objective.layer_weights(batch)
        assert weights.sum() == pytest.approx(1) and len(weights) == 1
        for term in ("reg", "ent", "err", "total"):
            loss = getattr(objective.terms(batch, weights), term)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                values = []
                for step in (1e-5, -1e-5):
                    with torch.no_grad():
                        parameter[0] += step
                        values.append(float(getattr(objective.terms(batch, weights), term)))
                        parameter[0] -= step
                slope = (values[0] - values[1]) / 2e-5
                assert float(gradient[0]) == pytest.approx(slope, rel=1e-4, abs=1e-7), (term, name)


def test_the_full_precision_model_has_no_error(loaded, calibration):
    draft = Draft(initial_of(loaded, calibration, "w4a4"))
    objective = Objective.of(context_of(loaded, calibration, "w4a4", **FAST), draft)
    terms = objective.terms(objective.batches[0], torch.ones(1))
    assert terms.err < 1e-6 and terms.reg > 0 and 0 < terms.ent < math.log(16)


# Training


def test_the_tower_is_searched_on_what_trained_norms_make_of_its_input(loaded, calibration, tiny_llava):
    """The norm in front of the first block belongs to no block."""
    result = optimize(loaded, calibration, veo_train="clip+norm", veo_norm_rate=0.01, veo_epochs=8)
    assert "model.vision_tower.pre_layrnorm.weight" in result.replaced
    context = context_of(loaded, calibration, "w3a3", **FAST)
    plan = build_plan(context, result.draft)
    found = quantized_inputs(context, plan, "vision")
    other = load(str(tiny_llava), dtype="float32")
    apply_plan(plan, other.model, other.fingerprint, backends.kernels("reference"))
    expected = block_inputs(context_of(other, calibration, "w3a3", **FAST), "vision")
    assert all(torch.allclose(one, two) for one, two in zip(found.states, expected.states, strict=True))
    plain = block_inputs(context, "vision")
    assert not torch.allclose(found.states[0], plain.states[0], atol=1e-3)


@pytest.mark.parametrize(
    "scheme, transform", [("w3a3", "none"), ("w16a16+vision:w3a8", "smooth")], ids=["plain", "folded"]
)
def test_training_lowers_the_objective_that_the_applied_plan_then_has(loaded, calibration, scheme, transform):
    options = {"veo_epochs": 8, "veo_train": "clip+norm", "veo_norm_rate": 0.005, "lambda1": 0.5}
    draft = Draft(initial_of(loaded, calibration, scheme))
    if transform != "none":  # norms are divided by scales
        options |= {"transform": transform, "activations": "token"}
        context = context_of(loaded, calibration, scheme, **FAST | options)
        draft = observe_extremes(context, smooth(context, Draft()))
        assert any("vision_tower" in fold.producer and "norm" in fold.producer for fold in draft.folds)
    result = optimize(loaded, calibration, scheme, draft=draft, **options)
    assert [row["epoch"] for row in result.curve] == list(range(1, 9)) and result.replaced
    assert result.after["total"] < result.before["total"] - 0.01
    assert result.curve[-1]["total"] < result.curve[0]["total"]
    for row in (result.before, *result.curve, result.after):
        assert row["total"] == pytest.approx(row["reg"] + 0.5 * row["ent"] + row["err"])

    context = context_of(loaded, calibration, scheme, **FAST | options)
    objective = Objective.of(context, result.draft)
    plan = build_plan(context, result.draft)
    apply_plan(plan, loaded.model, loaded.fingerprint, backends.kernels("reference"))
    with torch.no_grad():
        terms = [objective.terms(batch, torch.ones(1)) for batch in objective.batches]
    for name in ("reg", "ent", "err"):
        assert sum(float(getattr(term, name)) for term in terms) / len(terms) == pytest.approx(
            result.after[name], rel=1e-4, abs=1e-6
        )


def test_the_result_holds_clip_ratios_and_norms_only_when_asked(loaded, calibration):
    options = {"veo_decoder": "full", "lambda1": 0.0, "veo_epochs": 6}
    clip = optimize(loaded, calibration, **options)
    assert len(clip.tensors) == SITES and not clip.replaced and improved(clip)
    assert all(key.endswith("/clip_ratio") and 0 < float(value) <= 1 for key, value in clip.tensors.items())
    assert len({float(value) for value in clip.tensors.values()}) > 1
    both = optimize(loaded, calibration, **options, veo_train="clip+norm", veo_norm_rate=0.005)
    assert improved(both) and both.replaced and all("vision_tower" in name and "norm" in name for name in both.replaced)
    assert set(both.tensors) == set(clip.tensors) | {f"{name}/value" for name in both.replaced}
    assert not any("post_layernorm" in name or "layers.2." in name for name in both.replaced)  # not read by the output
    for name in both.replaced:
        assert not torch.equal(both.tensors[f"{name}/value"], loaded.model.get_parameter(name))


def test_training_that_makes_it_worse_keeps_the_untrained_parameters(loaded, calibration, monkeypatch):
    initial = initial_of(loaded, calibration, "w8a8")
    terms = Objective.terms

    def rising(self, batch, weights):
        """An objective that is least where all ratios are as at the start, but whose gradient leads away."""
        ratios = [m.clip_ratio for n, m in self.context.model.named_modules() if n.endswith("layers.0.mlp.fc1")]
        found, away = terms(self, batch, weights), ratios[0].sum()
        return found._replace(total=found.total * 0 + away - 2 * away.detach())

    monkeypatch.setattr(Objective, "terms", rising)
    result = optimize(loaded, calibration, "w8a8", initial, veo_train="clip+norm")
    assert not improved(result) and not result.replaced and len(result.curve) == 2
    assert all(torch.equal(value, initial[key]) for key, value in result.tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_left_as_it_was(loaded, calibration, dtype):
    loaded.model.to(dtype)
    next(loaded.model.parameters()).requires_grad_(False)
    initial = initial_of(loaded, calibration, "w3a3")

    def state():
        values = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        flags = [(name, parameter.requires_grad, parameter.grad) for name, parameter in loaded.model.named_parameters()]
        modules = [
            (name, id(module), module.training, "forward" in vars(module), len(module._forward_pre_hooks))
            for name, module in loaded.model.named_modules()
        ]
        return values, flags, modules

    before = state()
    result = optimize(loaded, calibration, initial=initial, veo_train="clip+norm", veo_norm_rate=0.05)
    assert len(result.curve) == 2 and all(math.isfinite(row["total"]) for row in result.curve)
    after = state()
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert after[1:] == before[1:]


def test_the_seed_decides_and_checkpointing_does_not(loaded, calibration):
    initial = initial_of(loaded, calibration, "w4a4")
    one = optimize(loaded, calibration, "w4a4", initial, veo_epochs=1)
    same = optimize(loaded, calibration, "w4a4", initial, veo_epochs=1)
    assert one.record == same.record
    assert all(torch.equal(one.tensors[key], same.tensors[key]) for key in one.tensors)
    kept = optimize(loaded, calibration, "w4a4", initial, veo_epochs=1, veo_checkpointing=False)
    assert [row["total"] for row in kept.curve] == pytest.approx([row["total"] for row in one.curve], rel=1e-6)
    other = CalibrationSet(calibration.samples, calibration.source, seed=1)
    assert optimize(loaded, other, "w4a4", initial, veo_epochs=1).curve != one.curve


def test_samples_without_an_image_change_nothing(loaded, calibration):
    initial = initial_of(loaded, calibration, "w4a4")
    silent = Sample(Conversation.from_prompt("what is nowhere?"), "answer")
    more = CalibrationSet((silent, *calibration.samples[:2], silent, *calibration.samples[2:]))
    with_them, without = (optimize(loaded, data, "w4a4", initial, veo_epochs=1) for data in (more, calibration))
    assert with_them.curve == without.curve


@pytest.mark.parametrize(
    ("scheme", "train"), [("w4a4+vision:w16a16", "clip+norm"), ("w4a16", "clip"), ("w16a16", "clip+norm")]
)
def test_a_tower_without_parameters_to_train_gives_nothing(loaded, calibration, scheme, train, monkeypatch):
    monkeypatch.setattr(objectives, "run", lambda *_: pytest.fail("ran the model"))
    result = optimize(loaded, calibration, scheme, {"none": torch.zeros(1)}, veo_train=train)
    assert not result.tensors and not result.replaced and not result.draft.record


def test_a_tower_with_quantized_weights_alone_can_train_its_norms(loaded, calibration):
    result = optimize(
        loaded, calibration, "w16a16+vision:w3a16", {"none": torch.zeros(1)}, veo_train="clip+norm", veo_epochs=4
    )
    assert improved(result) and set(result.tensors) == {f"{name}/value" for name in result.replaced}
    assert all(row["ent"] == 0 for row in result.curve)  # the decoder's activations have no codes


def test_an_interrupted_training_goes_on_with_the_next_epoch(loaded, calibration, tmp_path, monkeypatch):
    initial = initial_of(loaded, calibration, "w3a3")
    how = {"veo_train": "clip+norm", "veo_epochs": 3}
    undisturbed = optimize(loaded, calibration, initial=initial, **how)
    terms, calls, workspace = Objective.terms, [], Workspace(tmp_path / "steps")

    def fails(self, *arguments):
        calls.append(1)
        if len(calls) == 8:  # three batches before training, three in the first epoch, one in the second
            raise KeyboardInterrupt
        return terms(self, *arguments)

    monkeypatch.setattr(Objective, "terms", fails)
    with pytest.raises(KeyboardInterrupt):
        optimize(loaded, calibration, initial=initial, workspace=workspace, **how)
    resumed = optimize(loaded, calibration, initial=initial, workspace=workspace, **how)
    assert len(calls) == 8 + 3 + 6 + 3  # before, two epochs, after
    assert resumed.record == undisturbed.record and resumed.replaced == undisturbed.replaced
    assert all(torch.equal(resumed.tensors[key], value) for key, value in undisturbed.tensors.items())


def test_states_that_wait_on_the_cpu_change_nothing(loaded, calibration):
    initial = initial_of(loaded, calibration, "w4a4")
    there, here = (
        optimize(loaded, calibration, "w4a4", initial, footprint=Footprint(caches_on_cpu=on_cpu))
        for on_cpu in (True, False)
    )
    assert there.record == here.record


def test_gradients_that_overflow_are_taken_again(loaded, calibration, monkeypatch):
    """As in float16: the loss times the scale exceeds a bound that the second scale keeps."""
    initial = initial_of(loaded, calibration, "w4a4")
    expected, grad, scaled_losses = optimize(loaded, calibration, "w4a4", initial), torch.autograd.grad, []

    def narrow(loss, inputs, **how):
        found = grad(loss, inputs, **how)
        scaled_losses.append(float(loss.detach()))
        too_large = how.get("allow_unused") and scaled_losses[-1] > 2**11 * expected.after["total"]
        return [gradient * float("inf") for gradient in found] if too_large else found

    monkeypatch.setattr(torch.autograd, "grad", narrow)
    assert optimize(loaded, calibration, "w4a4", initial).record == expected.record
    assert max(scaled_losses) > 2**11 * expected.after["total"]


def test_an_objective_that_is_not_finite_is_an_error_and_the_model_kept(loaded, calibration):
    initial = initial_of(loaded, calibration, "w4a4")
    modules = [type(module) for module in loaded.model.modules()]
    with torch.no_grad():
        loaded.model.model.language_model.norm.weight.fill_(float("inf"))
    with pytest.raises(QVLMError, match=r"visual encoder optimization: .* is not finite"):
        optimize(loaded, calibration, "w4a4", initial)
    assert [type(module) for module in loaded.model.modules()] == modules
