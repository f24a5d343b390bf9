import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_problems import CENTERED, CENTERED8, NORMAL, STATIC, STATIC8, TOKEN, TOKEN8, int_format
from rotations import by_token, rotated
from tiny_llava import logits_of, write_tiny_llava
from torch import nn

from qvlm_plugin import backends, planning
from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels import sharing
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.kernels.int4_folded import INT4_FOLDED
from qvlm_plugin.kernels.int8 import INT8
from qvlm_plugin.kernels.nf4 import NF4
from qvlm_plugin.kernels.reference import REFERENCE, STRAIGHT_THROUGH
from qvlm_plugin.kernels.sharing import once
from qvlm_plugin.linear import QuantLinear, share_parameters
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.quantized_loading import QuantizeOnLoad
from qvlm_plugin.rotation import factors, rotation_of

WEIGHT = int_format(4)
CASES = [
    *((kernel, WEIGHT, activation) for kernel in (REFERENCE, STRAIGHT_THROUGH, INT4) for activation in (STATIC, TOKEN)),
    (INT4_FOLDED, WEIGHT, STATIC), (INT8, int_format(8), STATIC8), (INT8, int_format(8), TOKEN8),
    (INT8, int_format(8), CENTERED8), (REFERENCE, WEIGHT, CENTERED), (REFERENCE, WEIGHT, NORMAL),
    (NF4, WeightFormat(kind="nf", bits=4), TOKEN),
]  # fmt: skip


def site(kernel, weight, activation, count=3, with_rotation=False):
    """Linears of one site, with parameters in common."""
    torch.manual_seed(0)
    x, layers = torch.randn(2, 5, 256), []
    for _ in range(count):
        values = {"lower": x.amin((0, 1)), "upper": x.amax((0, 1)), "clip_ratio": torch.tensor([0.9])}
        values["center"] = x.mean((0, 1))
        parameters = {name: values[name].clone() for name in activation.parameters}
        layer = QuantLinear.from_linear(nn.Linear(256, 64), weight, activation, parameters, kernel)
        if with_rotation:
            layer.rotate_inputs(factors(rotation_of("site", 256)))
        layers.append(layer)
    share_parameters(layers)
    return x, layers


@pytest.fixture
def alone(monkeypatch):
    """Makes every Linear compute for itself."""
    return lambda: monkeypatch.setattr(sharing, "getattr", lambda *_: None, raising=False)


@pytest.fixture
def computed(monkeypatch):
    """A list that gets an item whenever an input is rounded or rotated."""
    seen, original = [], sharing._Computed

    def make(*arguments):
        seen.append(arguments[0][0])
        return original(*arguments)

    monkeypatch.setattr(sharing, "_Computed", make)
    return seen


@pytest.mark.parametrize(
    ("kernel", "weight", "activation", "with_rotation"),
    [*((*case, False) for case in CASES), *((*case, True) for case in CASES if case[2].kind == "dynamic_token")],
    ids=lambda value: getattr(value, "name", None) or str(value),
)
@torch.no_grad()
def test_it_is_computed_once_and_the_same_to_the_bit(kernel, weight, activation, with_rotation, computed, alone):
    if kernel is NF4:
        pytest.importorskip("bitsandbytes")
    x, layers = site(kernel, weight, activation, with_rotation=with_rotation)
    outputs = [layer(x) for layer in layers]
    assert len(computed) == 1 + with_rotation
    alone()
    assert all(torch.equal(layer(x), output) for layer, output in zip(layers, outputs, strict=True))
    assert len(computed) == 4 * (1 + with_rotation)


@pytest.mark.parametrize("with_rotation", [False, True])
@torch.no_grad()
def test_nothing_outlives_the_input(with_rotation):
    x, layers = site(REFERENCE, WEIGHT, TOKEN, with_rotation=with_rotation)
    hidden = x * 1
    layers[0](hidden)
    result = weakref.ref(getattr(hidden, sharing._ATTRIBUTE).result)
    gc.disable()
    try:
        assert result() is not None
        del hidden
        assert result() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_was_written_to_is_rounded_anew(mode, alone):
    with mode():
        x, layers = site(REFERENCE, WEIGHT, STATIC)
        x = x * 1
        steps = [lambda: x.mul_(2), lambda: x.neg_(), lambda: layers[0].lower.data.sub_(1), lambda: None]
        found = []
        for step in steps:
            found.append([layer(x) for layer in layers])
            step()
    with mode():
        x, layers = site(REFERENCE, WEIGHT, STATIC)
        x = x * 1
        alone()
        for outputs, step in zip(found, steps, strict=True):
            assert all(torch.equal(layer(x), output) for layer, output in zip(layers, outputs, strict=True))
            step()


@torch.no_grad()
def test_bounds_written_to_between_linears_count(alone):
    x, (first, second, _) = site(REFERENCE, WEIGHT, STATIC)
    first(x)
    second.lower.sub_(1)  # also the first's
    output = second(x)
    alone()
    assert torch.equal(second(x), output) and first.lower is second.lower


@torch.no_grad()
def test_bounds_of_a_call_are_its_own(computed, alone):
    x, layers = site(REFERENCE, WEIGHT, STATIC)
    wider = {"lower": layers[0].lower - 1, "upper": layers[0].upper + 1}
    both = nn.ModuleList(layers)

    def run(bounds):
        given = {f"{index}.{name}": bound for index in range(3) for name, bound in bounds.items()}
        return torch.func.functional_call(Run(both), {f"layers.{name}": bound for name, bound in given.items()}, x)

    runs = [({}), wider, {}, wider]
    outputs = [run(bounds) for bounds in runs]
    assert len(computed) == 4 and not torch.equal(outputs[0], outputs[1])  # once in each call
    alone()
    assert all(torch.equal(run(bounds), output) for bounds, output in zip(runs, outputs, strict=True))


class Run(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers])


def test_gradients_are_those_of_linears_that_compute_for_themselves(computed, alone):
    def gradients():
        x, layers = site(STRAIGHT_THROUGH, WEIGHT, TOKEN)
        x.requires_grad_()
        layers[0].clip_ratio.requires_grad_()
        assert layers[0].clip_ratio is layers[2].clip_ratio
        return torch.autograd.grad(sum(layer(x).square().sum() for layer in layers), [x, layers[0].clip_ratio])

    shared = gradients()
    assert not computed
    alone()
    assert all(torch.equal(one, other) for one, other in zip(shared, gradients(), strict=True))


@torch.no_grad()
def test_other_bounds_are_not_shared(computed):
    x, layers = site(REFERENCE, WEIGHT, STATIC, count=2)
    layers[1].lower = nn.Parameter(layers[1].lower - 1, requires_grad=False)
    share_parameters(layers)
    for layer in layers:
        layer(x)
    assert layers[0].lower is not layers[1].lower and layers[0].upper is layers[1].upper and len(computed) == 2


@torch.no_grad()
def test_inputs_that_stay_as_they_are_keep_nothing():
    x = torch.randn(3)
    assert once(x, {}, (), "nothing", lambda: x) is x and not hasattr(x, sharing._ATTRIBUTE)


@torch.no_grad()
def test_threads_do_not_disturb_each_other(alone):
    _, layers = site(REFERENCE, WEIGHT, TOKEN)
    common = torch.randn(3, 256)
    inputs = [torch.randn(3, 256) if index % 2 else common for index in range(64)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: [layer(x) for layer in layers], inputs))
    alone()
    for x, outputs in zip(inputs, found, strict=True):
        assert all(torch.equal(layer(x), output) for layer, output in zip(layers, outputs, strict=True))


@pytest.mark.parametrize("with_rotation", [False, True])
@pytest.mark.parametrize("how", ["applied", "loaded"])
@pytest.mark.parametrize("backend", ["reference", "packed"])
def test_a_model_rounds_once_for_each_site(tmp_path, calibration, computed, alone, backend, how, with_rotation):
    folder = write_tiny_llava(tmp_path / "model", hidden=64)
    loaded = load(str(folder), dtype="float32")
    options = {"group_size": 32, "calibration_batch_size": 5}
    request = check_request("rtn", "w4a4+vision:w8a8", options)
    plan = planning.obtain_plan(loaded, request, calibration, cache=None)
    plan = rotated(by_token(plan)) if with_rotation else plan
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    if how == "applied":
        planning.apply(plan, loaded, backend)
    else:
        loaded = load(str(folder), dtype="float32", quantize=QuantizeOnLoad(plan, backends.kernels(backend)))
    computed.clear()
    logits = logits_of(loaded.model, inputs)
    sites = {module.site for module in plan.quantized}
    assert len(computed) == len(sites) * (1 + with_rotation) < len(plan.quantized) * (1 + with_rotation)
    alone()
    assert torch.equal(logits_of(loaded.model, inputs), logits)
    assert len(computed) == (len(sites) + len(plan.quantized)) * (1 + with_rotation)
