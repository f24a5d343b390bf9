"""Another package's method, topology and kernel are provided through the same hooks as the built-in ones."""

import pytest
import torch
import torch.nn.functional as F

from qvlm_plugin import backends, builtin, planning, plugins
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.families.llava import llava_topology
from qvlm_plugin.formats import ActivationFormat
from qvlm_plugin.hooks import hookimpl
from qvlm_plugin.kernels.base import Kernel, as_stored
from qvlm_plugin.methods.base import Method, Step
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.plan_request import check_request


class TwoBits(MethodOptions):
    def weight_format(self, bits):
        return super().weight_format(2)

    def activation_format(self, part, bits):
        return ActivationFormat()


class Coarse:
    """A third-party plugin: two-bit weights whatever the scheme, a kernel that negates, a record of what finished."""

    def __init__(self):
        self.finished = []

    @hookimpl
    def qvlm_methods(self):
        nothing = Step("nothing", lambda context, draft: draft, lambda scheme, options: True, needs_calibration=False)
        return [Method("coarse", "two bits", TwoBits, (nothing,))]

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
    request = check_request("coarse", "w8a8", {"group_size": 16})
    plan = planning.obtain_plan(loaded, request, None, cache=None)
    assert {module.weight.bits for module in plan.modules if module.site} == {2}
    weight = loaded.model.get_submodule(plan.modules[0].name).weight.clone()
    planning.apply(plan, loaded, backend="negating")
    replaced = loaded.model.get_submodule(plan.modules[0].name)
    assert torch.equal(replaced.negative, -weight) and replaced.kernel.name == "negating"
    assert coarse.finished == [(loaded, plan)]


def test_unknown_names_list_what_every_plugin_provides(coarse, loaded):
    with pytest.raises(QVLMError, match="allowed are awq, coarse, gptq, mbq, none, qlora, "):
        plugins.method("fine")
    with pytest.raises(
        QVLMError, match=r"backend='fast' is not known; allowed are auto, packed, .*negating, reference"
    ):
        backends.kernels("fast")


def test_two_plugins_may_not_provide_the_same_name(coarse):
    plugins.plugin_manager().register(Coarse())
    with pytest.raises(QVLMError, match=r"two plugins provide a method named 'coarse': .+ and .+; uninstall one"):
        plugins.methods()


class Faulty:
    """Hooks that raise, or return what they should not."""

    @hookimpl
    def qvlm_methods(self):
        return [1 / 0]

    @hookimpl
    def qvlm_topology(self, config):
        raise KeyError(config.model_type)

    @hookimpl
    def qvlm_kernels(self):
        return ["fast"]

    @hookimpl
    def qvlm_quantized(self, plan):
        raise OSError("disk full")


def test_a_plugin_that_raises_is_named_once_and_the_others_work(coarse, loaded, caplog):
    plugins.plugin_manager().register(Faulty(), "faulty")
    request = check_request("rtn", "w8a16", {})
    plan = planning.obtain_plan(loaded, request, None, cache=None)
    planning.apply(plan, loaded)
    assert "coarse" in plugins.methods() and coarse.finished == [(loaded, plan)]
    told = [record.getMessage() for record in caplog.records if record.name == "qvlm_plugin.plugins"]
    assert told == [
        "plugin faulty is left out: qvlm_methods raised ZeroDivisionError: division by zero",
        "plugin faulty is left out: qvlm_topology raised KeyError: 'llava'",
        "plugin faulty: qvlm_kernels must return a list of Kernel, not 'fast'",
        "plugin faulty is left out: qvlm_quantized raised OSError: disk full",
    ]


def test_what_a_plugin_says_about_a_model_is_told(coarse, loaded):
    class Picky:
        @hookimpl
        def qvlm_topology(self, config):
            raise QVLMError("this size has another layout")

    plugins.plugin_manager().register(Picky())
    with pytest.raises(QVLMError, match="this size has another layout"):
        plugins.topology(loaded.model.config)


def install(monkeypatch, folder, name, code):
    """A distribution with an entry point."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[qvlm_plugin]\n{name} = {name}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_a_package_that_cannot_be_imported_or_has_a_wrong_hook_is_named(monkeypatch, tmp_path, caplog):
    install(monkeypatch, tmp_path, "absent_dependency", "import nothing_of_this_name")
    wrong = "from qvlm_plugin.hooks import hookimpl\n@hookimpl\ndef qvlm_methods(more): pass"
    install(monkeypatch, tmp_path, "wrong_hook", wrong)
    manager = plugins.create_manager(builtin, entry_points=True)
    monkeypatch.setattr(plugins, "plugin_manager", lambda: manager)
    assert "rtn" in plugins.methods()
    assert "plugin absent_dependency of package absent_dependency is left out: qvlm_methods raised Modul" in caplog.text
    assert "plugin wrong_hook of package wrong_hook is left out: qvlm_methods raised PluginValidation" in caplog.text


def test_installed_packages_are_found_by_entry_point(monkeypatch, tmp_path):
    code = """
from qvlm_plugin.hooks import hookimpl
from qvlm_plugin.methods.base import Method
from qvlm_plugin.methods.options import MethodOptions

@hookimpl
def qvlm_methods():
    return [Method("found", "", MethodOptions, ())]
"""
    install(monkeypatch, tmp_path, "installed_elsewhere", code)
    manager = plugins.create_manager(builtin, entry_points=True)
    assert "found" in [method.name for provided in manager.hook.qvlm_methods() for method in provided]


class Wrapping(Coarse):
    """Its hooks are pluggy's wrappers, of the new kind and the old; one is not."""

    @hookimpl(wrapper=True)
    def qvlm_methods(self):
        answers = yield
        return answers

    @hookimpl(hookwrapper=True)
    def qvlm_kernels(self):
        yield

    @hookimpl(wrapper=True)
    def qvlm_topology(self, config):
        return (yield)


@pytest.mark.parametrize("hook", ["qvlm_methods", "qvlm_kernels", "qvlm_topology", "qvlm_quantized"])
def test_hook_wrappers_are_told_and_left_out(monkeypatch, loaded, caplog, hook):
    wrapping, quantized = Wrapping(), []
    manager = plugins.create_manager(builtin, wrapping)
    monkeypatch.setattr(plugins, "plugin_manager", lambda: manager)
    plugins._warn.cache_clear()
    asked = {
        "qvlm_methods": lambda: "rtn" in plugins.methods(),
        "qvlm_kernels": lambda: "reference" in backends.all_kernels(),
        "qvlm_topology": lambda: plugins.topology(loaded.model.config) is not None,
        "qvlm_quantized": lambda: plugins.notify_quantized(loaded, quantized) or len(wrapping.finished) == 1,
    }
    assert asked[hook]()
    told = [record.message for record in caplog.records]
    assert bool(told) == (hook != "qvlm_quantized")  # the one that is none
    assert all("is left out: its" in message and hook in message for message in told)
