import subprocess
import sys
from dataclasses import replace
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from kernel_problems import A16, TOKEN, relative
from recorded_plan import write_recorded_plan
from rotations import by_token, rotated
from stored_codes import with_codes
from tiny_llava import logits_of, write_tiny_llava
from torch import nn

from qvlm_plugin import backends, planning
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels.reference import STRAIGHT_THROUGH
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import RoundingPlan, apply_plan, quantized_linear, replace_and_fold
from qvlm_plugin.plan_header import Fold, ModulePlan, Rotation, read_header
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.quantizers import fake_quantize, quantize_int
from qvlm_plugin.rotation import factors, rotate, rotate_back, rotation_of


def apply(plan, loaded, backend="reference"):
    return apply_plan(plan, loaded.model, loaded.fingerprint, backends.kernels(backend))


def dense(rotation):
    signs, *matrices = factors(rotation)
    return signs[:, None] * reduce(torch.kron, matrices, torch.ones(1, 1))


@pytest.mark.parametrize(
    ("channels", "outer", "block"),
    [(576, 36, 16), (1536, 12, 128), (384, 12, 32), (4096, 1, 4096), (11008, 172, 64), (896, 28, 32), (8960, 140, 64),
     (4304, 269, 16), (7, 7, 1), (1, 1, 1), (24, 12, 2), (6, 3, 2)],
)  # fmt: skip
def test_widths_get_the_smallest_hadamard_matrix_that_there_is(channels, outer, block):
    rotation = rotation_of("site", channels)
    assert (rotation.outer, rotation.block, rotation.channels) == (outer, block, channels)
    x = torch.randn(3, channels)
    matrices = factors(rotation)
    torch.testing.assert_close(rotate_back(rotate(x, matrices), matrices), x, rtol=0, atol=1e-5)
    assert max(len(matrix) for matrix in matrices[1:] or [x]) <= max(outer, 64)


@pytest.mark.parametrize("channels", [1, 2, 7, 24, 96, 512, 576])
def test_it_is_signs_and_the_dense_kronecker_product(channels):
    rotation = rotation_of("site", channels, seed=5)
    matrix = dense(rotation).double()
    assert (matrix @ matrix.T - torch.eye(channels)).abs().max() < 1e-6
    if channels != 7:  # a massive channel becomes two values
        assert (matrix.abs() - channels**-0.5).abs().max() < 1e-6
    x = torch.randn(2, 3, channels)
    torch.testing.assert_close(rotate(x, factors(rotation)), x @ matrix.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate_back(x, factors(rotation)), x @ matrix.T.float(), rtol=1e-5, atol=1e-5)


def test_a_common_mean_does_not_become_a_massive_channel():
    """As behind a GELU: without signs, the first column would collect the mean of all channels."""
    x = F.gelu(torch.randn(50, 1536, generator=torch.Generator().manual_seed(0)))
    signs, *matrices = factors(rotation_of("site", 1536))
    signed, plain = rotate(x, [signs, *matrices]), rotate(x, [torch.ones(1536), *matrices])
    assert plain.abs().amax() > 10 * x.std() > 2 * signed.abs().amax()


def test_the_seed_decides_in_every_process_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    for channels in (576, 7):
        drawn = [dense(rotation_of("site", channels, seed)) for seed in (1, 1, 2)]
        assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2], atol=0.01)
    assert torch.equal(torch.get_rng_state(), state)
    code = (
        "from qvlm_plugin.rotation import factors, rotation_of\n"
        "print(factors(rotation_of('site', 7, 1))[1].flatten()[:6].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = factors(rotation_of("site", 7, 1))
    assert done.stdout.strip() == str(found[1].flatten()[:6].tolist())
    # Recorded where the tests were written: another machine's linear algebra gives the same up to a last digit.
    assert found[0].tolist() == SIGNS
    torch.testing.assert_close(found[1][0, :3], torch.tensor(RECORDED), rtol=1e-6, atol=1e-7)


SIGNS = [-1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
RECORDED = [-0.03664144, 0.15311411, 0.22118607]


@pytest.mark.parametrize("channels", [6, 24])
def test_gradients(channels):
    matrices = factors(rotation_of("site", channels))
    x = torch.randn(4, channels, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, matrices), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x, matrices = torch.randn(5, 96).to(dtype), factors(rotation_of("site", 96))
    assert torch.equal(rotate(x, matrices), rotate(x.float(), matrices).to(dtype))
    assert rotate(x[:0], matrices).shape == (0, 96)


@pytest.mark.parametrize("values", [{"block": 6}, {"block": 0}, {"outer": 0}, {"kind": "other"}, {"seed": -1}])
def test_impossible_rotations_are_refused(values):
    with pytest.raises(ValueError):
        Rotation(**{"site": "x", "outer": 3, "block": 8, **values})


# In a layer


def one_linear(activation, weight=None, shape=(10, 24)):
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0])
    module = ModulePlan(
        name="x", part="vision", site="x", shape=shape, weight=weight or WeightFormat(), activation=activation
    )
    return module, linear, rotation_of("x", shape[1], seed=2)


def test_four_bits_by_token_equal_a_computation_by_hand():
    fmt = WeightFormat(kind="int", bits=4, group_size=8)
    module, linear, rotation = one_linear(TOKEN, fmt)
    x, tensors = torch.randn(2, 5, 24), {"x/clip_ratio": torch.ones(1)}
    matrix = dense(rotation)
    turned, weight = x @ matrix, linear.weight.detach() @ matrix
    inputs = fake_quantize(turned, turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True), 4)
    rounded = quantize_int(weight, WeightFormat(kind="int", bits=4, group_size=8)).dequantize()
    expected = F.linear(inputs, rounded, linear.bias)
    for kernel in (backends.all_kernels()["reference"], STRAIGHT_THROUGH):
        layer = quantized_linear(module, linear, tensors, kernel, rotation)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert "rotated" in repr(layer)
    assert relative(quantized_linear(module, linear, tensors, kernel)(x), expected) > 0.05


def test_gradients_go_through_the_rotation():
    module, linear, rotation = one_linear(TOKEN)
    layer = quantized_linear(module, linear, {"x/clip_ratio": torch.ones(1)}, STRAIGHT_THROUGH, rotation)
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    assert relative(x.grad, linear.weight.sum(0).expand(3, -1)) < 0.3


def test_a_cast_leaves_the_rotation_as_it_is():
    module, linear, rotation = one_linear(A16)
    layer = quantized_linear(module, linear, {}, STRAIGHT_THROUGH, rotation).to(torch.bfloat16)
    kept = [getattr(layer, name) for name in layer.rotation_names]
    assert layer.weight.dtype == torch.bfloat16 and len(kept) == 3
    assert all(torch.equal(matrix, right) for matrix, right in zip(kept, factors(rotation), strict=True))
    assert layer(torch.randn(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


# In a model


@pytest.fixture
def inputs(loaded, calibration):
    return next(calibration.batches(loaded.processor, 5))[0]


@pytest.fixture
def identity(loaded):
    return planning.obtain_plan(loaded, check_request("none", "w4a4", {}), None, cache=None)


@pytest.fixture
def plan(loaded, calibration):
    options = {"group_size": 16, "calibration_batch_size": 5, "alpha_steps": 2, "bias_correction": True}
    request = check_request("awq", "w4a8", options)
    return by_token(planning.obtain_plan(loaded, request, calibration, cache=None))


def test_rotations_alone_leave_the_model_as_it_is(identity, loaded, inputs):
    before = logits_of(loaded.model, inputs)
    plan = rotated(identity)
    assert len(plan.rotations) == 18 and {module.part for module in plan.quantized} == {
        "vision",
        "projector",
        "decoder",
    }
    apply(plan, loaded)
    layers = [module for module in loaded.model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == len(plan.quantized) and all(layer.rotation_names for layer in layers)
    torch.testing.assert_close(logits_of(loaded.model, inputs), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("codes", [False, True])
def test_folds_come_before_rotations_and_both_before_rounding(plan, loaded, tiny_llava, inputs, tmp_path, codes):
    plan = rotated(plan)
    assert plan.folds and {rotation.scaled for rotation in plan.rotations} == {False, True}
    by_hand, found = (load(str(tiny_llava), dtype="float32") for _ in range(2))
    if codes:
        plan, codes_of = with_codes(plan, load(str(tiny_llava), dtype="float32"))
    replace_and_fold(plan, dict(by_hand.model.named_modules()))
    for module in plan.quantized:
        linear = by_hand.model.get_submodule(module.name)
        matrix, values = dense(plan.rotation_of(module)), plan.tensors
        scale = values[f"{module.site}/scale"] if plan.rotation_of(module).scaled else torch.ones(len(matrix))
        rotated_weight = (linear.weight.detach() * scale) @ matrix
        fmt, name = module.weight, module.name
        if codes:
            rounded = codes_of[name]
        else:
            rounded = quantize_int(rotated_weight, fmt, values.get(f"{name}/clip")).dequantize()
        bias = linear.bias
        if fmt.corrected:
            shift = (rotated_weight - rounded) @ values[f"{module.site}/mean"]
            bias = shift if bias is None else bias + shift
        of_inputs = matrix / scale[:, None]
        by_hand.model.set_submodule(name, ByHand(rounded, bias, of_inputs, values[f"{module.site}/clip_ratio"]))
    apply(RoundingPlan.load(plan.save(tmp_path / "plan")), found)
    # A code that lies between two steps can fall to either side.
    assert relative(logits_of(found.model, inputs), logits_of(by_hand.model, inputs)) < 0.04


class ByHand(nn.Module):
    def __init__(self, weight, bias, matrix, clip_ratio):
        super().__init__()
        self.weight, self.bias, self.matrix, self.clip_ratio = weight, bias, matrix, clip_ratio

    def forward(self, x):
        x = x @ self.matrix
        lower, upper, mean = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), x.mean(-1, keepdim=True)
        bounds = (mean + (bound - mean) * self.clip_ratio for bound in (lower, upper))
        return F.linear(fake_quantize(x, *bounds, 8), self.weight, self.bias)


def test_saving_and_loading_keeps_rotations(plan, tmp_path):
    turned = rotated(plan)
    again = RoundingPlan.load(turned.save(tmp_path / "plan"))
    header = read_header(tmp_path / "plan")
    assert again.rotations == turned.rotations == header.rotations and header.format_version == 3
    assert again.hash == turned.hash == header.hash != plan.hash != rotated(plan, seed=4).hash != turned.hash
    assert "rotations" not in (plan.save(tmp_path / "none") / "plan.json").read_text()
    assert RoundingPlan.load(write_recorded_plan(tmp_path / "old")).rotations == ()


def test_what_cannot_be_rotated_is_refused(loaded, calibration, identity):
    request = check_request("rtn", "w4a4", {"calibration_batch_size": 5})
    plan = planning.obtain_plan(loaded, request, calibration, cache=None)
    static = next(module for module in plan.modules if module.activation.kind == "static_channel")
    site = static.site
    other = (*identity.rotations, rotation_of("nowhere", 8))
    turned = rotated(identity)
    first, plain = turned.rotations[:2]
    assert first.scaled and not plain.scaled
    fold = Fold(site=first.site, producer=first.site)
    before = list(loaded.model.modules())
    for wrong, reason in [
        (rotated(plan, {site}), rf"rotates the inputs of {site}, which cannot be: .*static ranges per channel"),
        (replace(identity, rotations=other), "rotates the inputs of nowhere, .*no Linear of the model has this site"),
        (replace(identity, rotations=(plain, plain)), "the plan rotates it already"),
        (replace(identity, rotations=(first,)), f"no finite tensor {first.site}/scale of "),
        (
            replace(turned, tensors={**turned.tensors, f"{first.site}/scale": -torch.ones(first.channels)}),
            f"a scale in {first.site}/scale that is not positive",
        ),
        (replace(turned, folds=(fold,)), "its scale is folded into another module already"),
        (
            replace(identity, rotations=(plain.model_copy(update={"outer": 10**12}),)),
            r"it is of \d+ channels, and model.vision_tower.* has \d+",
        ),
    ]:
        with pytest.raises(QVLMError, match=reason) as caught:
            apply(wrong, loaded)
        assert "\n" not in str(caught.value) and list(loaded.model.modules()) == before


@pytest.mark.parametrize("backend", ["reference", "packed"])
def test_packed_kernels_get_rotated_inputs(tmp_path, calibration, backend):
    folder = write_tiny_llava(tmp_path / "model", hidden=64)
    loaded, expected = (load(str(folder), dtype="float32") for _ in range(2))
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    request = check_request("rtn", "w4a8+vision:w8a8", {"group_size": 32, "calibration_batch_size": 5})
    plan = rotated(by_token(planning.obtain_plan(loaded, request, calibration, cache=None)))
    execution = apply(plan, loaded, backend)
    assert ("int4" in execution.counts and "int8" in execution.counts) == (backend == "packed")
    apply(plan, expected)
    assert relative(logits_of(loaded.model, inputs), logits_of(expected.model, inputs)) < 0.05
