import dataclasses
import itertools

import pytest
import torch
from searching import context_of, inputs_of
from tiny_llava import logits_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qvlm_plugin import planning
from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods import lp
from qvlm_plugin.methods.draft import Draft, build_plan
from qvlm_plugin.methods.hidden import block_inputs
from qvlm_plugin.methods.minmax import observe_extremes
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.methods.qvlm import mining, vision
from qvlm_plugin.methods.qvlm.mining import candidate_layer, fraction_bounds, quantile_bounds, search_block
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.plan_request import check_request

BATCH = {"calibration_batch_size": 2}
GRID = {"min_percentile": 0.7, "percentile_step": 0.15}


def plan_of(loaded, calibration, scheme="w4a4", name="qvlm", **options):
    options = {"veo": False, **GRID, **BATCH, **options}
    return planning.obtain_plan(loaded, check_request(name, scheme, options), calibration, cache=None)


def percentiles(plan):
    """One percentile for each decoder layer."""
    return [next(iter(layer.values())) for block in plan.record["cdm"]["blocks"] for layer in block["percentiles"]]


@pytest.fixture
def block(deep, calibration):
    """Two layers ready to be searched, the quantized block input, targets."""
    context = context_of(deep, calibration, "w3a3", weights="nf", observer="lp", **GRID)
    plan = build_plan(context, lp.search_ranges(context, Draft()))
    hidden = reference = block_inputs(context)
    members, targets = [], []
    for index in range(2):
        member, reference = candidate_layer(context, plan, index, reference)
        members.append(member)
        targets.append(reference)
    return members, hidden, targets


def run_all(members, choices, hidden):
    for member, choice in zip(members, choices, strict=True):
        hidden = member.run(dict.fromkeys((site.name for site in member.sites), choice), hidden)
    return hidden


def test_a_block_gets_the_best_of_all_combinations_and_never_less_than_layer_by_layer(block):
    members, start, targets = block
    found = search_block(members, start, targets, MethodOptions(**GRID))
    joint, error = found.choices, found.error
    errors = {
        choices: run_all(members, choices, start).error(targets[-1], MethodOptions())
        for choices in itertools.product(range(3), repeat=2)
    }
    assert error == pytest.approx(min(errors.values())) and len(set(errors.values())) > 3
    assert errors[tuple(next(iter(layer.values())) for layer in joint)] == pytest.approx(error)

    greedy, hidden = [], start
    for member, target in zip(members, targets, strict=True):
        (choice,) = search_block([member], hidden, [target], MethodOptions(**GRID)).choices
        hidden = member.run(choice, hidden)
        greedy.append(next(iter(choice.values())))
    assert error <= errors[tuple(greedy)]
    beamed = search_block(members, start, targets, MethodOptions(**GRID, beam=9))
    assert beamed == found and found.output is None
    hidden = start
    for member, chosen in zip(members, joint, strict=True):
        hidden = member.run(chosen, hidden)
    assert all(map(torch.equal, beamed.output.states, hidden.states))


def test_a_site_may_choose_apart_and_a_wide_beam_then_beats_one_percentile_per_layer(block):
    members, start, targets = block
    options = MethodOptions(**GRID, unit="site", beam=81)
    found = search_block(members[:1], start, targets[:1], options)
    assert set(found.choices[0]) == {site.name for site in members[0].sites}
    assert found.error <= search_block(members[:1], start, targets[:1], MethodOptions(**GRID)).error


def test_an_error_that_is_not_finite_names_the_layer(block):
    members, start, targets = block
    last = dataclasses.replace(targets[-1], states=[target + 1e30 for target in targets[-1].states])
    far = [*targets[:-1], last]  # its square is not a float32
    with pytest.raises(QVLMError, match=r"error of model\.language_model\.layers\.1 is not finite") as caught:
        search_block(members, start, far, MethodOptions(**GRID))
    assert "\n" not in str(caught.value)


def test_depth_one_is_the_layer_wise_search(deep, calibration):
    single = plan_of(deep, calibration, max_depth=1)
    assert [block["layers"] for block in single.record["cdm"]["blocks"]] == [[0], [1], [2], [3]]
    assert percentiles(single) == percentiles(plan_of(deep, calibration, h0=1e9))


def test_percentile_one_keeps_the_layer_wise_baseline(deep, calibration):
    only_one = plan_of(deep, calibration, min_percentile=1.0)
    baseline = planning.obtain_plan(deep, check_request("qlora", "w4a4", BATCH), calibration, cache=None)
    assert set(percentiles(only_one)) == {1.0}
    assert only_one.hash == plan_of(deep, calibration, cdm=False).hash == baseline.hash


def bounds_of(reading, tokens, *others):
    return fraction_bounds(tokens.mean(dim=0), *others) if reading == "fraction" else quantile_bounds(tokens, *others)


@pytest.mark.parametrize("reading", ["fraction", "quantile"])
def test_bounds_narrow_with_the_percentile_and_one_keeps_them(reading):
    torch.manual_seed(0)
    tokens = torch.randn(1001, 4) + torch.tensor([0.0, 5.0, -5.0, 100.0])
    lower, upper = tokens.amin(dim=0), tokens.amax(dim=0)
    whole, *narrowed = bounds_of(reading, tokens, lower, upper, (1.0, 0.99, 0.9))
    assert whole == (lower, upper)
    widths = [high - low for low, high in narrowed]
    assert (widths[1] < widths[0]).all() and (widths[0] < upper - lower).all() and (widths[1] > 0).all()
    if reading == "quantile":
        low, high = narrowed[1]
        assert torch.allclose(low, tokens.quantile(0.1, dim=0)) and torch.allclose(high, tokens.quantile(0.9, dim=0))
    else:
        assert torch.allclose(widths[1], 0.9 * (upper - lower))


@pytest.mark.parametrize("reading", ["fraction", "quantile"])
def test_candidates_are_those_of_the_tokens_of_all_batches(deep, calibration, reading):
    context = context_of(deep, calibration, "w4a4", observer="minmax", reading=reading, **GRID)
    plan = build_plan(context, observe_extremes(context, Draft()))
    member, _ = candidate_layer(context, plan, 0, block_inputs(context))
    for site, batches in inputs_of(context, member.sites).items():
        tokens = torch.cat(batches)
        lower, upper = (plan.tensors[f"{site.name}/{key}"] for key in ("lower", "upper"))
        torch.testing.assert_close((lower, upper), tuple(tokens.aminmax(dim=0)))
        bounds = bounds_of(reading, tokens, lower, upper, context.options.percentiles)
        for found, expected in zip(member.candidates[site.name], bounds, strict=True):
            torch.testing.assert_close((found["lower"], found["upper"]), expected)


def test_quantiles_outside_of_the_initial_bounds_replace_them():
    """A range around the mean of a channel with one massive token may lie above nearly all of its values."""
    torch.manual_seed(0)
    tokens = torch.rand(600, 1)
    tokens[0] = 1000
    lower, upper = torch.tensor([1.1]), torch.tensor([500.0])
    for low, high in quantile_bounds(tokens, lower, upper, (0.99, 0.9)):
        assert low < high and ((tokens >= low) & (tokens <= high)).float().mean() > 0.75


class LargestResult(TorchDispatchMode):
    """Notes how many elements the largest result of an operation has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.numel = max([self.numel, *(tensor.numel() for tensor in tree_leaves(result))])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("elements", [1, 1000, 7 * 501, 2**24])
def test_quantiles_are_ranks_of_sorted_tokens_however_many_are_sorted_at_a_time(dtype, elements, monkeypatch):
    torch.manual_seed(0)
    tokens, percentiles = torch.randn(501, 40).to(dtype), (0.999, 0.98, 0.9, 0.6)
    lower, upper = torch.full((40,), -2.0), torch.full((40,), 1.5)
    monkeypatch.setattr(mining, "SORTED", elements)
    with LargestResult() as largest:
        bounds = quantile_bounds(tokens, lower, upper, percentiles)
    assert largest.numel <= max(elements, len(tokens), 2 * len(percentiles) * 40)
    for p, (low, high) in zip(percentiles, bounds, strict=True):
        ordered = tokens.float().sort(dim=0).values
        assert torch.equal(low, ordered[round((1 - p) * 500)].clamp_min(-2))
        assert torch.equal(high, ordered[round(p * 500)].clamp_max(1.5))


@pytest.mark.parametrize("name", ["qvlm", "qvlm_jacobian"])
def test_the_whole_method_fits_saves_applies_and_leaves_the_model_alone(name, deep, calibration, tmp_path):
    inputs, _ = next(calibration.batches(deep.processor, 5))
    before = logits_of(deep.model, inputs)
    plan = plan_of(deep, calibration, name=name, cdm=True, veo=True, veo_epochs=1, veo_train="clip+norm", beam=2)
    assert plan.method == name
    assert torch.equal(logits_of(deep.model, inputs), before)
    again = RoundingPlan.load(plan.save(tmp_path / "plan"))
    assert again.hash == plan.hash and len(again.record["veo"]["curve"]) == 1
    covered = [layer for block in again.record["cdm"]["blocks"] for layer in block["layers"]]
    assert covered == [0, 1, 2, 3]
    planning.apply(again, deep)
    error = (logits_of(deep.model, inputs) - before).norm() / before.norm()
    assert 0 < error < 1


@pytest.mark.parametrize("importance", ["uniform", "jacobian"])
def test_an_interrupted_search_resumes_at_its_block_and_ends_the_same(
    importance, deep, calibration, tmp_path, monkeypatch
):
    options = {**GRID, **BATCH, "max_depth": 1, "veo_epochs": 1, "veo_train": "clip+norm", "importance": importance}
    request = check_request("qvlm", "w4a4", options)
    undisturbed = planning.obtain_plan(deep, request, calibration, None)
    searched, trained = [], []

    def search(members, *arguments):
        if len(searched) == 2:
            searched.append("interrupted")
            raise KeyboardInterrupt
        searched.append(members[0].name)
        return search_block(members, *arguments)

    def train(*arguments):
        trained.append(1)
        return train_tower(*arguments)

    train_tower = vision.train_tower
    monkeypatch.setattr(mining, "search_block", search)
    monkeypatch.setattr(vision, "train_tower", train)
    with pytest.raises(KeyboardInterrupt):
        planning.obtain_plan(deep, request, calibration, tmp_path)
    resumed = planning.obtain_plan(deep, request, calibration, tmp_path)
    names = [f"model.language_model.layers.{index}" for index in range(4)]
    assert searched == [*names[:2], "interrupted", *names[2:]] and trained == [1]
    assert resumed.hash == undisturbed.hash and resumed.record == undisturbed.record
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]  # nothing unfinished stays behind


def test_token_weights_decide_which_errors_count(block):
    members, start, targets = block
    options = MethodOptions(**GRID)
    nothing = [[torch.zeros_like(batch.attended, dtype=torch.float32) for batch in start.batches] for _ in members]
    assert search_block(members, start, targets, options, nothing).error == 0
    ones = [[weights + 1 for weights in layer] for layer in nothing]
    expected = search_block(members, start, targets, options)
    assert search_block(members, start, targets, options, ones) == expected
    answers = [[batch.answer.float() for batch in start.batches] for _ in members]
    only_answers = search_block(members, start, targets, MethodOptions(**GRID, tokens="answer"))
    found = search_block(members, start, targets, options, answers)
    assert found.choices == only_answers.choices and found.error == pytest.approx(only_answers.error)


def test_sixteen_bits_are_the_identity_and_parts_left_out_are_not_searched(deep, calibration):
    identity = plan_of(deep, calibration, "w16a16", veo=True)
    assert not identity.tensors and all(module.is_identity for module in identity.modules)
    vision_only = plan_of(deep, calibration, "w16a16+vision:w4a4", veo=True, veo_epochs=1)
    assert set(vision_only.record) == {"veo"}
    weight_only = plan_of(deep, calibration, "w4a16", veo=True)
    assert not weight_only.record


def test_samples_without_answers_are_named_before_the_range_search(deep, calibration, monkeypatch):
    monkeypatch.setattr(lp, "search_ranges", lambda *_: pytest.fail("searched"))
    mute = dataclasses.replace(calibration.samples[0], answer=" ")
    unanswered = CalibrationSet((mute, *calibration.samples[1:]), "task:split:5")
    with pytest.raises(QVLMError, match=r"calibration='task:split:5': 1 of 5 samples have no answer") as caught:
        plan_of(deep, unanswered, veo=True)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert plan_of(deep, unanswered, min_percentile=1.0).tensors  # only what looks at answers needs them
    with pytest.raises(QVLMError, match="importance=uniform"):
        plan_of(deep, unanswered, importance="jacobian")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_percentile": 0}, "min_percentile=0 is not allowed"),
        ({"min_percentile": -0.1}, "min_percentile=-0.1 is not allowed"),
        ({"min_percentile": 1.5}, "min_percentile=1.5 is not allowed"),
        ({"percentile_step": 0}, "percentile_step=0 is not allowed"),
        ({"percentile_step": 1}, "percentile_step=1 is not allowed"),
        ({"max_depth": 0}, "max_depth=0 is not allowed"),
        ({"max_depth": -1}, "max_depth=-1 is not allowed"),
        ({"reading": "middle"}, "reading='middle' is not allowed"),
        ({"tokens": "even"}, "tokens='even' is not allowed"),
        ({"unit": "site"}, "set beam, for example beam=4"),
    ],
)
def test_impossible_settings_are_one_line_errors_before_any_work(options, message):
    with pytest.raises(QVLMError, match=message) as caught:
        check_request("qvlm", "w4a4", options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prune", [0.3, 0.7])
def test_a_pruned_search_measures_its_choice_on_all_samples(prune, block):
    members, start, targets = block
    options = MethodOptions(**GRID, prune=prune)
    found = search_block(members, start, targets, options)
    picked = [next(iter(layer.values())) for layer in found.choices]
    assert found.error == pytest.approx(run_all(members, picked, start).error(targets[-1], options))
    best = search_block(members, start, targets, MethodOptions(**GRID))
    assert found.error >= best.error and 0 < len(start.spread(prune)) < len(start.states)


def test_the_part_is_the_same_in_however_many_processes(block):
    _, start, _ = block
    whole = dataclasses.replace(start, states=start.states * 7, batches=start.batches * 7)  # 21 batches
    for share in (0.1, 0.34, 0.5, 1.0):
        chosen, found = whole.spread(share), []
        for first, stop in ((0, 10), (10, 21)):
            part = dataclasses.replace(whole, first=first, states=whole.states[first:stop])
            found += [first + index for index in part.spread(share)]
        assert found == chosen and chosen[0] == 0 and len(chosen) == pytest.approx(21 * share, abs=1)
