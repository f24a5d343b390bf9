import pytest
import torch
from stored_codes import other_parameters

from qvlm_plugin import plugins
from qvlm_plugin.methods.base import MethodOptions
from qvlm_plugin.methods.build import build_plan
from qvlm_plugin.plan_header import Rotation
from qvlm_plugin.scheme import Scheme
from qvlm_plugin.topology import resolve

OPTIONS = MethodOptions(group_size=16)


def build(loaded, tensors, **more):
    topology = plugins.topology(loaded.model.config)
    return build_plan("mine", loaded, topology, Scheme.parse("w4a16"), OPTIONS, tensors, None, **more)


@pytest.fixture
def names(loaded):
    """Of the Linears of two sites."""
    sites = resolve(plugins.topology(loaded.model.config), loaded.model)
    return [site.name for site in sites if site.part == "decoder"][:2]


def test_weights_with_codes_among_the_tensors_are_stored(loaded, names):
    tensors = {
        f"{name}/{key}": tensor
        for name in names
        for key, tensor in other_parameters(
            loaded.model.get_submodule(name).weight.detach(), OPTIONS.weight_format(4)
        ).items()
    }
    plan = build(loaded, tensors)
    assert {module.name for module in plan.modules if module.weight.stored} == set(names)
    with pytest.raises(ValueError, match="not clipped"):
        build(loaded, tensors | {f"{names[0]}/clip": torch.ones(1)})


def test_rotations_pass_through(loaded, names):
    rotations = [Rotation.of_channels(name, 24, seed) for seed, name in enumerate(names)]
    assert build(loaded, {}, rotations=rotations).rotations == tuple(rotations)
