import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from kernel_problems import relative
from recorded_plan import HEADER, PLAN_HASH, TABLE_HASH, TENSORS, write_recorded_plan
from rotations import by_token, rotated
from safetensors.torch import save
from stored_codes import with_codes
from tiny_llava import logits_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qvlm_plugin import backends, planning, plugins
from qvlm_plugin import plan as plan_module
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import RoundingPlan, apply_plan, replace_and_fold
from qvlm_plugin.plan_header import Fold, read_header
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.topology import linear_layers, resolve


@pytest.fixture
def plan(loaded, calibration):
    request = check_request("rtn", "w4a4+vision:w8a8", {"group_size": 16, "calibration_batch_size": 5})
    return planning.obtain_plan(loaded, request, calibration, cache=None)


def apply(plan, loaded, backend="reference"):
    return apply_plan(plan, loaded.model, loaded.fingerprint, backends.kernels(backend))


def test_saving_and_loading_keeps_everything(plan, tmp_path):
    again = RoundingPlan.load(plan.save(tmp_path / "plan"))
    assert again.hash == plan.hash and again.table_hash == plan.table_hash
    assert read_header(tmp_path / "plan").facts == again.facts == plan.facts
    assert again.modules == plan.modules and again.calibration == plan.calibration
    assert (again.method, again.scheme, again.options) == (plan.method, plan.scheme, plan.options)
    assert again.search_seconds == plan.search_seconds
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in plan.tensors.items())


def test_saving_replaces_an_older_plan_and_nothing_else(plan, tmp_path):
    plan.save(tmp_path / "plan")
    newer = dataclasses.replace(plan, search_seconds=123.0, record={"curve": [{"epoch": 0, "total": 1.5}]})
    assert newer.hash == plan.hash and not plan.record
    again = RoundingPlan.load(newer.save(tmp_path / "plan"))
    assert again.search_seconds == 123.0 and again.record == newer.record
    assert [file.name for file in tmp_path.iterdir()] == ["plan"]  # nothing half-written lies about
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("dear to someone")
    with pytest.raises(QVLMError, match="holds files other than a plan"):
        plan.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_the_hash_follows_what_the_plan_does(plan):
    assert dataclasses.replace(plan, search_seconds=1e9, method="other").hash == plan.hash
    name = next(iter(plan.tensors))
    assert dataclasses.replace(plan, tensors={**plan.tensors, name: plan.tensors[name] + 1}).hash != plan.hash
    assert dataclasses.replace(plan, modules=plan.modules[1:]).hash != plan.hash
    assert dataclasses.replace(plan, model="another").hash != plan.hash


def test_every_linear_is_listed_and_every_planned_one_replaced(plan, loaded):
    before = linear_layers(loaded.model)
    assert [module.name for module in plan.modules] == list(before)
    apply(plan, loaded)
    for module in plan.modules:
        replaced = loaded.model.get_submodule(module.name)
        assert isinstance(replaced, nn.Linear if module.is_identity else QuantLinear)
    assert {module.part for module in plan.modules if module.is_identity} == {"unused", "other"}


@pytest.mark.parametrize("turned", [False, True])
def test_a_dispatched_model_keeps_its_device_hooks(plan, loaded, calibration, turned):
    plan = rotated(by_token(plan)) if turned else plan
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    dispatch_model(loaded.model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    hooked = {name for name, module in linear_layers(loaded.model).items() if hasattr(module, "_hf_hook")}
    apply(plan, loaded)
    quantized = {name for name, module in loaded.model.named_modules() if isinstance(module, QuantLinear)}
    assert quantized & hooked
    assert all(hasattr(loaded.model.get_submodule(name), "_hf_hook") for name in quantized & hooked)
    assert logits_of(loaded.model, inputs).isfinite().all()


def test_effective_bits_count_scales_and_zero_points(plan):
    bits = plan.effective_bits()
    assert bits["decoder"] == {"weight": pytest.approx(4 + (16 + 4) / 16), "activation": 4}
    assert 8 < bits["vision"]["weight"] <= 8 + 24 / 8 and bits["vision"]["activation"] == 8
    assert bits["unused"] == bits["other"] == {"weight": 16, "activation": 16}


def test_a_plan_for_another_model_is_refused_and_the_model_kept(plan, loaded):
    def refuses(changed, message):
        before = linear_layers(loaded.model)
        with pytest.raises(QVLMError, match=message):
            apply(changed, loaded)
        assert linear_layers(loaded.model) == before

    first = plan.modules[0]
    refuses(dataclasses.replace(plan, model="f" * 64), "another model")
    refuses(dataclasses.replace(plan, modules=plan.modules[1:]), f"leaves out 1 .*{first.name}")
    stranger = first.model_copy(update={"name": "model.stranger"})
    refuses(dataclasses.replace(plan, modules=(*plan.modules, stranger)), "does not have.*stranger")
    reshaped = first.model_copy(update={"shape": (1, 2)})
    refuses(dataclasses.replace(plan, modules=(reshaped, *plan.modules[1:])), r"as \(1, 2\)")
    name = f"{plan.modules[-2].site}/lower"
    without = {key: tensor for key, tensor in plan.tensors.items() if key != name}
    refuses(dataclasses.replace(plan, tensors=without), name)
    refuses(dataclasses.replace(plan, tensors={**plan.tensors, name: plan.tensors[name] * float("nan")}), name)


def test_folding_scales_leaves_full_precision_outputs_as_they_are(loaded, calibration):
    torch.manual_seed(0)
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    before = logits_of(loaded.model, inputs)
    identity = planning.obtain_plan(loaded, check_request("none", "w4a4", {}), None, cache=None)
    folds, tensors = [], {}
    for site in resolve(plugins.topology(loaded.model.config), loaded.model):
        if site.producer:
            shared_heads = site.producer.endswith("language_model.layers.0.self_attn.v_proj")
            folds.append(
                Fold(site=site.name, producer=site.producer, head_dim=8 if "v_proj" in site.producer else None)
            )
            width = len(loaded.model.get_submodule(site.producer).weight)
            assert not shared_heads or width < loaded.model.get_submodule(site.name).in_features  # grouped queries
            tensors[f"{site.name}/scale"] = torch.rand(width) + 0.5
    weights = {name: linear.weight.clone() for name, linear in linear_layers(loaded.model).items()}
    apply(dataclasses.replace(identity, folds=tuple(folds), tensors=tensors), loaded)
    changed = [n for n, linear in linear_layers(loaded.model).items() if not torch.equal(linear.weight, weights[n])]
    assert len(folds) == 2 * 3 + 2 * 4 and len(changed) >= 2 * 5 + 2 * 7
    assert torch.allclose(logits_of(loaded.model, inputs), before, rtol=1e-3, atol=1e-4)


def test_replaced_parameters_take_their_new_values(loaded, tmp_path):
    identity = planning.obtain_plan(loaded, check_request("none", "w4a4", {}), None, cache=None)
    name = "model.vision_tower.encoder.layers.0.layer_norm1.weight"
    value = torch.full_like(loaded.model.get_parameter(name), 3.0)
    plan = dataclasses.replace(identity, replaced=(name,), tensors={f"{name}/value": value})
    assert plan.hash != identity.hash
    apply(RoundingPlan.load(plan.save(tmp_path / "plan")), loaded)
    assert torch.equal(loaded.model.get_parameter(name), value)
    with pytest.raises(QVLMError, match="not a parameter"):
        apply(dataclasses.replace(plan, replaced=("model.nothing",)), loaded)


def test_damaged_folders_are_named(plan, tmp_path):
    folder = plan.save(tmp_path / "plan")
    blob, header = (folder / "plan.safetensors").read_bytes(), (folder / "plan.json").read_text()
    with pytest.raises(QVLMError, match=r"plan\.json is missing"):
        RoundingPlan.load(tmp_path / "absent")
    (folder / "plan.safetensors").write_bytes(blob[:-1])
    with pytest.raises(QVLMError, match=r"plan\.safetensors is truncated or altered"):
        RoundingPlan.load(folder)
    (folder / "plan.safetensors").write_bytes(blob)
    for content, message in [
        (header[:-20], "not a plan"),
        ("[]", "not a plan"),
        (json.dumps({**json.loads(header), "surprise": 1}), "not a plan"),
        (json.dumps({**json.loads(header), "format_version": 99}), "this version reads up to 3"),
    ]:
        (folder / "plan.json").write_text(content)
        with pytest.raises(QVLMError, match=message):
            RoundingPlan.load(folder)


def test_a_16_bit_plan_is_the_identity_bit_for_bit(loaded, calibration):
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    before = logits_of(loaded.model, inputs)
    for method in ("none", "rtn", "qlora"):
        request = check_request(method, "w16a16", {})
        plan = planning.obtain_plan(loaded, request, calibration, cache=None)
        assert not request.needs_calibration and plan.calibration is None
        apply(plan, loaded)
        assert torch.equal(logits_of(loaded.model, inputs), before)


def test_a_plan_found_on_several_devices_is_on_none_of_them():
    with FakeTensorMode():
        found = {"a/lo": torch.ones(3, device="cuda:0"), "b/lo": torch.ones(3, device="cuda:1"), "c/lo": torch.ones(3)}
        plan = RoundingPlan("rtn", "w4a4", {}, "f" * 64, (), found)
        assert {tensor.device.type for tensor in plan.tensors.values()} == {"cpu"}
        assert torch.stack([*plan.tensors.values()]).shape == (3, 3)


def test_plans_of_version_0_1_load_and_are_written_as_they_were(tmp_path):
    folder = write_recorded_plan(tmp_path / "old")
    plan = RoundingPlan.load(folder)
    assert (plan.hash, plan.table_hash) == (PLAN_HASH, TABLE_HASH) == (read_header(folder).hash, plan.table_hash)
    assert all(torch.equal(plan.tensors[name], tensor) for name, tensor in TENSORS.items())
    again = dataclasses.replace(plan).save(tmp_path / "new")  # from its tensors, not from the file
    assert (again / "plan.safetensors").read_bytes() == (folder / "plan.safetensors").read_bytes()
    assert json.loads((again / "plan.json").read_text()) == HEADER


# Codes


@pytest.fixture
def awq_plan(loaded, calibration):
    options = {"group_size": 16, "calibration_batch_size": 5, "alpha_steps": 2, "bias_correction": True}
    return planning.obtain_plan(loaded, check_request("awq", "w3a8", options), calibration, cache=None)


def test_a_plan_applies_its_codes_to_the_folded_model(awq_plan, loaded, tiny_llava, calibration, tmp_path):
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    plan, values = with_codes(awq_plan, loaded)
    assert plan.folds and any(module.weight.corrected for module in plan.modules)
    expected = load(str(tiny_llava), dtype="float32")
    replace_and_fold(plan, dict(expected.model.named_modules()))
    # By hand: the codes' values, and biases that make up for their distance from the folded weights.
    for module in plan.quantized:
        linear = expected.model.get_submodule(module.name)
        if module.weight.corrected:
            shift = (linear.weight - values[module.name]) @ plan.tensors[f"{module.site}/mean"]
            linear.bias = nn.Parameter(shift if linear.bias is None else linear.bias + shift)
        linear.weight = nn.Parameter(values[module.name])
    plain = tuple(
        module.model_copy(update={"weight": type(module.weight)()}) if not module.is_identity else module
        for module in plan.modules
    )
    untouched = dataclasses.replace(plan, modules=plain, folds=(), replaced=())
    apply(untouched, expected)
    found = load(str(tiny_llava), dtype="float32")
    apply(RoundingPlan.load(plan.save(tmp_path / "plan")), found)
    assert relative(logits_of(found.model, inputs), logits_of(expected.model, inputs)) < 1e-4
    nearest = load(str(tiny_llava), dtype="float32")
    apply(awq_plan, nearest)
    assert relative(logits_of(nearest.model, inputs), logits_of(expected.model, inputs)) > 0.01


def test_a_plan_with_normal_tokens_is_saved_in_a_version_that_says_so(loaded, calibration, tmp_path):
    plans = {}
    for bounds in ("extremes", "normal"):
        request = check_request(
            "rtn", "w4a3", {"activations": "token", "token_bounds": bounds, "calibration_batch_size": 5}
        )
        plans[bounds] = planning.obtain_plan(loaded, request, calibration, cache=None)
    versions = {name: read_header(plan.save(tmp_path / name)).format_version for name, plan in plans.items()}
    assert versions == {"extremes": 1, "normal": 3}
    again = RoundingPlan.load(tmp_path / "normal")
    assert again.hash == plans["normal"].hash and again.modules == plans["normal"].modules
    assert {str(module.activation) for module in again.quantized} == {"dynamic_token 3-bit normal"}


def test_a_plan_with_codes_is_saved_in_a_version_that_says_so(awq_plan, loaded, tmp_path):
    plan, _ = with_codes(awq_plan, loaded)
    again = RoundingPlan.load(plan.save(tmp_path / "codes"))
    awq_plan.save(tmp_path / "none")
    versions = [read_header(tmp_path / name).format_version for name in ("codes", "none")]
    assert versions == [3, 3]  # older programs refuse the one, and read the other
    assert again.hash == plan.hash == read_header(tmp_path / "codes").hash != awq_plan.hash
    assert again.modules == plan.modules and again.tensors.keys() == plan.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in plan.tensors.items())
    assert plan.effective_bits() == awq_plan.effective_bits()
    name = next(key for key in plan.tensors if key.endswith("/codes"))
    other = {**plan.tensors, name: plan.tensors[name] ^ 1}
    assert dataclasses.replace(plan, tensors=other).hash != plan.hash


def test_what_cannot_be_codes_of_the_model_is_refused(awq_plan, loaded, tiny_llava):
    plan, _ = with_codes(awq_plan, loaded)
    loaded = load(str(tiny_llava), dtype="float32")
    module = next(module for module in plan.quantized if module.part == "decoder")
    codes, scales, zeros = (f"{module.name}/{name}" for name in ("codes", "scales", "zero_points"))
    rows, columns = module.shape

    def refuses(key, tensor, message):
        tensors = {name: value for name, value in {**plan.tensors, key: tensor}.items() if value is not None}
        with pytest.raises(QVLMError, match=message) as caught:
            apply(dataclasses.replace(plan, tensors=tensors), loaded)
        assert "\n" not in str(caught.value)

    values = plan.tensors
    refuses(codes, None, rf"no uint8 tensor {codes} \[{rows}, {columns}\]")
    refuses(codes, values[codes][:, :-1], rf"no uint8 tensor {codes}")
    refuses(codes, values[codes].int(), rf"no uint8 tensor {codes}")
    refuses(codes, values[codes] + 8, rf"a code in {codes} that is larger than 7, the largest of 3 bits")
    refuses(scales, values[scales].flatten(), rf"no floating tensor {scales} \[{rows}, ")
    refuses(scales, values[scales].int(), rf"no floating tensor {scales}")
    refuses(scales, values[scales] * 0, rf"scales in {scales} that are not positive and finite")
    refuses(scales, values[scales] * torch.nan, rf"scales in {scales} that are not positive and finite")
    refuses(zeros, None, rf"no uint8 tensor {zeros}")
    refuses(zeros, values[zeros] + 200, rf"a code in {zeros} that is larger than 7")
    apply(plan, loaded)


def test_progressive_codes_are_saved_and_multiples_that_do_not_fit_refused(loaded, calibration, tiny_llava, tmp_path):
    options = {"group_size": 16, "activations": "token", "group_scales": "progressive", "rounding": "gptq"}
    options |= {"calibration_batch_size": 5}
    plan = planning.obtain_plan(loaded, check_request("rtn", "w4a8", options), calibration, cache=None)
    again = RoundingPlan.load(plan.save(tmp_path / "plan"))
    assert again.hash == plan.hash and all(module.weight.progressive for module in plan.quantized)
    key = f"{plan.quantized[0].name}/multiples"
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    outputs = []
    for backend in ("reference", "packed"):
        model = load(str(tiny_llava), dtype="float32")
        apply(again, model, backend)
        outputs.append(logits_of(model.model, inputs))
    assert relative(*outputs) < 1e-4
    for wrong in (0, 17):
        tensors = {**plan.tensors, key: torch.full_like(plan.tensors[key], wrong)}
        with pytest.raises(QVLMError, match=f"plan has a multiple in {key} that is 0, or"):
            apply(dataclasses.replace(plan, tensors=tensors), load(str(tiny_llava), dtype="float32"))


def test_the_tensors_are_hashed_and_written_without_a_copy(plan, tmp_path, monkeypatch):
    kinds = {
        "b": torch.randn(3), "a/é\u0001\"": torch.ones(2, 3, dtype=torch.uint8), "scalar": torch.tensor(1.5),
        "turned": torch.randn(4, 2).bfloat16().t(), "none": torch.empty(0, 3), "flags": torch.tensor([True]),
    }  # fmt: skip
    for tensors in ({}, kinds, plan.tensors):
        written = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        parts = list(plan_module._file_parts(tensors))
        assert b"".join(parts) == written  # to the byte what the library writes
        assert dataclasses.replace(plan, tensors=tensors).tensors_sha256 == hashlib.sha256(written).hexdigest()
    large = torch.zeros(2**20)
    part = list(plan_module._file_parts({"x": large}))[-1]
    large += 1
    assert bytes(part[:4]) == large[:1].numpy().tobytes()  # the part is the tensor's own memory

    folder = plan.save(tmp_path / "plan")
    monkeypatch.setattr(plan_module, "_file_parts", lambda tensors: pytest.fail("serialized again"))
    assert plan.hash == plan.facts["plan_hash"] == RoundingPlan.load(folder).hash == read_header(folder).hash


def test_tensors_are_read_where_they_lie(loaded, plan, tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux says what is mapped")
    read = RoundingPlan.load(dataclasses.replace(plan, tensors={"x": torch.zeros(2**22)}).save(tmp_path / "plan"))
    assert str(tmp_path / "plan" / "plan.safetensors") in maps.read_text() and read.tensors["x"].sum() == 0
