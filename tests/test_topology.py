import dataclasses

import pytest
import torch
from tiny_llava import write_tiny_llava
from torch import nn

from qvlm_plugin import plugins
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.families.llava import llava_topology
from qvlm_plugin.models.loading import load
from qvlm_plugin.topology import Group, Stack, linear_layers, resolve


def test_sites_share_an_input_and_cover_all_that_affects_the_output(loaded):
    sites = resolve(llava_topology(loaded.model.config), loaded.model)
    assert [site.part for site in sites] == ["vision"] * 8 + ["projector"] * 2 + ["decoder"] * 8
    named = [name for site in sites for name in site.linears]
    assert len(named) == len(set(named))
    without = set(linear_layers(loaded.model)) - set(named)
    assert {name.split(".")[-4] for name in without if name != "lm_head"} <= {"layers", "2"}
    assert all(name == "lm_head" or ".layers.2." in name for name in without)  # feature layer -2: block 2 is unused

    # Whatever is not at a site indeed cannot be seen in the features.
    pixels = torch.randn(1, 3, 28, 28)
    before = loaded.model.get_image_features(pixels).pooler_output
    for name in without - {"lm_head"}:
        nn.init.normal_(loaded.model.get_submodule(name).weight, std=10)
    after = loaded.model.get_image_features(pixels).pooler_output
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_linears_of_a_site_read_the_same_tensor(loaded):
    sites = resolve(llava_topology(loaded.model.config), loaded.model)
    seen = {}
    for name, module in linear_layers(loaded.model).items():
        module.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0]}))
    ids = torch.tensor([[3, 3, 3, 3, 5, 6, 7]])
    loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 28, 28))
    for site in sites:
        assert all(seen[name] is seen[site.name] for name in site.linears)
        assert site.producer is None or loaded.model.get_submodule(site.producer) is not None


@pytest.mark.parametrize("layer, used", [(-1, 3), (-2, 2), (1, 1), ([-3, -2], 2)])
def test_used_blocks_follow_the_feature_layer(tmp_path, layer, used):
    loaded = load(str(write_tiny_llava(tmp_path / "m")))
    loaded.model.config.vision_feature_layer = layer
    sites = resolve(llava_topology(loaded.model.config), loaded.model)
    assert {site.block for site in sites if site.part == "vision"} == set(range(used))


def test_a_linear_that_the_topology_does_not_name_is_an_error(loaded):
    loaded.model.model.language_model.layers[1].mlp.extra = nn.Linear(2, 2)
    with pytest.raises(QVLMError, match=r"layers\.1.*differ.*mlp\.extra"):
        resolve(llava_topology(loaded.model.config), loaded.model)


def test_a_topology_of_another_model_is_an_error(loaded):
    topology = dataclasses.replace(llava_topology(loaded.model.config), decoder=Stack("blocks", (Group(("a",)),)))
    with pytest.raises(QVLMError, match=r"language_model\.blocks"):
        resolve(topology, loaded.model)


def test_unknown_families_are_named(loaded):
    loaded.model.config.vision_config.model_type = "resnet"
    with pytest.raises(QVLMError, match=r"'resnet'.*known towers are clip_vision_model"):
        plugins.topology(loaded.model.config)
    loaded.model.config.model_type = "gpt-image"
    with pytest.raises(QVLMError, match="'gpt-image' is not supported"):
        plugins.topology(loaded.model.config)


def test_experts_in_one_parameter_are_an_error(loaded):
    loaded.model.model.language_model.layers[1].mlp.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 2))
    with pytest.raises(
        QVLMError, match=r"layers\.1: mlp\.gate_up_proj is a Parameter of shape \(4, 8, 2\), not a Linear"
    ):
        resolve(llava_topology(loaded.model.config), loaded.model)
