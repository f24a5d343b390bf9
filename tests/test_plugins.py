"""Another package's method, topology and kernel are provided through the same hooks as the built-in ones."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from qvlm_plugin import builtin, planning, plugins
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.families.llava import llava_topology
from qvlm_plugin.hooks import hookimpl
from qvlm_plugin.kernels.base import Kernel, as_stored
from qvlm_plugin.methods.base import Method, MethodOptions, build_plan


class Coarse:
    """A third-party plugin: two-bit weights whatever the scheme, a kernel that negates, a record of what finished."""

    def __init__(self):
        self.finished = []

    @hookimpl
    def qvlm_methods(self):
        def fit(loaded, topology, scheme, calibration, options, workspace):
            plan_scheme = planning.Scheme.parse("w2a16")
            return build_plan("coarse", loaded, topology, plan_scheme, options, {}, calibration)

        return [Method("coarse", "two bits", MethodOptions, lambda scheme, options: False, fit)]

    @hookimpl
    def qvlm_topology(self, config):
        return llava_topology(config) if config.model_type == "llava" else None

    @hookimpl
    def qvlm_kernels(self):
        def prepare(weight, bias, *formats):
            return {"negative": -weight} | ({} if bias is None else {"bias": bias})

        def forward(x, tensors, activation_format):
            return F.linear(x, tensors["negative"], tensors.get("bias"))

        return [Kernel("negating", lambda *problem: None, prepare, as_stored, forward)]

    @hookimpl
    def qvlm_quantized(self, loaded, plan):
        self.finished.append((loaded, plan))


@pytest.fixture
def coarse(monkeypatch):
    plugin = Coarse()
    manager = plugins.create_manager(builtin, plugin)
    monkeypatch.setattr(plugins, "plugin_manager", lambda: manager)
    return plugin


def test_a_third_party_method_and_kernel_work_like_built_in_ones(coarse, loaded):
    request = planning.check_request("coarse", "w8a8", {"group_size": 16})
    plan = planning.obtain_plan(loaded, request, None, cache=None)
    assert {module.weight.bits for module in plan.modules if module.site} == {2}
    weight = loaded.model.get_submodule(plan.modules[0].name).weight.clone()
    planning.apply(plan, loaded, backend="negating")
    replaced = loaded.model.get_submodule(plan.modules[0].name)
    assert torch.equal(replaced.negative, -weight) and replaced.kernel.name == "negating"
    assert coarse.finished == [(loaded, plan)]


def test_unknown_names_list_what_every_plugin_provides(coarse, loaded):
    with pytest.raises(QVLMError, match="allowed are awq, coarse, none, qlora, qvlm, qvlm_jacobian, rtn"):
        plugins.method("fine")
    with pytest.raises(
        QVLMError, match=r"backend='fast' is not known; allowed are auto, packed, .*negating, reference"
    ):
        plugins.kernels("fast")


def test_two_plugins_may_not_provide_the_same_name(coarse):
    plugins.plugin_manager().register(Coarse())
    with pytest.raises(QVLMError, match="two plugins provide a method named 'coarse'"):
        plugins.methods()


def test_installed_packages_are_found_by_entry_point(monkeypatch, tmp_path):
    module = types.ModuleType("installed_elsewhere")
    module.qvlm_methods = hookimpl(lambda: [Method("found", "", MethodOptions, lambda scheme, options: False, None)])
    monkeypatch.setitem(sys.modules, "installed_elsewhere", module)
    info = tmp_path / "installed_elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qvlm_plugin]\nfound = installed_elsewhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    manager = plugins.create_manager(builtin, entry_points=True)
    assert "found" in [method.name for provided in manager.hook.qvlm_methods() for method in provided]
