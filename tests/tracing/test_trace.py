"""Traced topologies: those that are described are the oracle."""

from dataclasses import replace

import pytest
import torch
from family_list import FAMILIES
from tiny_families import (
    write_tiny_aya_vision,
    write_tiny_idefics3,
    write_tiny_internvl,
    write_tiny_qwen3_vl_moe,
    write_tiny_seer,
)
from tiny_llava import write_tiny_llava
from torch import nn

from qvlm_plugin import plugins
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.loading import open_checkpoint
from qvlm_plugin.models.placement import empty_model
from qvlm_plugin.topology import Group, Stack, resolve
from qvlm_plugin.tracing import trace as tracing
from qvlm_plugin.tracing.source import python_source
from qvlm_plugin.tracing.trace import trace

LEGITIMATE = {
    # The projector of LLaVA before v1.5 has a second Linear that is a unit matrix, which is kept. Only weights tell.
    "llava-v1.3": {"projector": Stack("", (Group(("linear_1",)), Group(("linear_2",), producer="linear_1")))},
}
"""Where a traced topology may differ from the described one."""


@pytest.mark.parametrize("name", FAMILIES)
def test_traced_equals_declared_and_is_written_as_python(name, tmp_path):
    checkpoint = open_checkpoint(str(FAMILIES[name](tmp_path / "model")))
    found = trace(checkpoint)
    assert found == replace(plugins.topology(checkpoint.config), **LEGITIMATE.get(name, {}))
    source = python_source(found, empty_model(checkpoint.config))
    module = {}
    exec(source, module)
    assert module["qvlm_topology"](checkpoint.config) == found
    assert max(map(len, source.splitlines())) <= 120


def test_what_reads_one_norm_together_is_one_group(tmp_path):
    checkpoint = open_checkpoint(str(write_tiny_aya_vision(tmp_path / "model")))
    found = trace(checkpoint)
    attention, *_, down = found.decoder.groups
    assert attention.producer == "input_layernorm"
    assert {name.rpartition(".")[2] for name in attention.linears} == {
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj",
    }  # fmt: skip
    assert down == Group(("mlp.down_proj",), producer="mlp.up_proj")
    source, module = python_source(found, empty_model(checkpoint.config)), {}
    assert max(map(len, source.splitlines())) <= 120
    exec(source, module)
    assert module["TOPOLOGY"] == found


def test_a_model_that_transformers_does_not_know_with_fused_linears(tmp_path):
    found = trace(open_checkpoint(str(write_tiny_seer(tmp_path / "model")), trust_remote_code=True))
    assert (found.vision_path, found.projector_path, found.decoder_path) == ("eye", "bridge", "voice")
    assert found.projector.groups == (Group(("widen",), producer="calm"),)
    assert found.decoder.groups == (
        Group(("self_attn.qkv_proj",), producer="input_layernorm"),
        Group(("self_attn.o_proj",)),  # scales of values alone cannot be folded into the fused Linear
        Group(("mlp.gate_up_proj",), producer="post_attention_layernorm"),
        Group(("mlp.down_proj",)),
    )


@pytest.fixture
def changed(monkeypatch):
    """Lets a test change the models that are traced."""

    def change(edit):
        made = tracing.skeleton

        def skeleton(*args):
            model = made(*args)
            edit(model)
            return model

        monkeypatch.setattr(tracing, "skeleton", skeleton)

    return change


def complaint(folder):
    with pytest.raises(QVLMError) as caught:
        trace(open_checkpoint(str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_linear_that_is_never_reached_is_named(changed, tiny_llava):
    changed(lambda model: setattr(model.model.language_model.layers[1].mlp, "extra", nn.Linear(4, 4)))
    message = complaint(tiny_llava)
    assert "model.language_model.layers.1.mlp.extra is reached by no prompt" in message
    assert "docs/add-a-family.md), and list it among the kept Linears" in message


def test_linears_that_share_a_tensor_on_some_prompts_only_are_named(changed, tiny_llava):
    short = 30  # tokens: prompts with an image have more

    def copied(module, args):
        return (args[0].clone(),) if args[0].shape[1] < short else None

    changed(lambda model: model.model.language_model.layers[0].mlp.up_proj.register_forward_pre_hook(copied))
    message = complaint(tiny_llava)
    assert (
        "mlp.gate_proj and mlp.up_proj of model.language_model.layers.0 read the same tensor for some prompts"
        in message
    )


def test_blocks_that_group_their_linears_differently_are_named(changed, tiny_llava):
    copied = lambda module, args: (args[0].clone(),)  # noqa: E731
    changed(lambda model: model.model.language_model.layers[0].mlp.up_proj.register_forward_pre_hook(copied))
    message = complaint(tiny_llava)
    assert "mlp.gate_proj shares its input with different Linears in different blocks" in message or (
        "mlp.up_proj shares its input with different Linears in different blocks" in message
    )


def test_a_tower_without_blocks_is_not_supported(changed, tmp_path):
    folder = write_tiny_idefics3(tmp_path / "model")
    changed(lambda model: setattr(model.model.vision_model.encoder, "layers", nn.ModuleList()))
    assert "found no list of vision blocks with Linear layers that processes an image" in complaint(folder)


def test_a_tower_that_changes_nothing_is_not_supported(changed, tiny_llava):
    changed(lambda model: model.model.multi_modal_projector.register_forward_hook(lambda *run: torch.ones_like(run[2])))
    assert "output does not depend on the output of model.vision_tower.encoder.layers" in complaint(tiny_llava)


def test_what_fails_in_a_run_is_one_line(changed, tiny_llava):
    changed(lambda model: setattr(model.model.language_model, "norm", nn.LayerNorm(5)))
    assert "the model cannot be traced: Given normalized_shape=[5]" in complaint(tiny_llava)


def test_experts_in_one_parameter_are_refused(tmp_path):
    message = complaint(write_tiny_qwen3_vl_moe(tmp_path / "model"))
    assert "layers.0: mlp.experts.gate_up_proj is a Parameter of shape" in message


def test_blocks_whose_output_nobody_reads_are_left_out(changed, tmp_path):
    folder = write_tiny_idefics3(tmp_path / "model")
    changed(
        lambda model: model.model.vision_model.encoder.layers[-1].register_forward_hook(
            lambda block, args, output: args[0]
        )
    )
    checkpoint = open_checkpoint(str(folder))
    found = trace(checkpoint)
    assert found.vision == replace(plugins.topology(checkpoint.config).vision, depth=1)
    blocks = {site.block for site in resolve(found, empty_model(checkpoint.config)) if site.part == "vision"}
    assert blocks == {0}


def test_a_norm_with_another_reader_is_no_producer(changed, tmp_path):
    folder = write_tiny_internvl(tmp_path / "model")

    def leaking(block, args, output):
        return output + block.input_layernorm(output)

    changed(lambda model: [layer.register_forward_hook(leaking) for layer in model.model.language_model.layers])
    groups = trace(open_checkpoint(str(folder))).decoder.groups
    assert [group.producer for group in groups] == [
        None, "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj",
    ]  # fmt: skip


def test_experts_that_no_token_chose_are_described_by_the_others(changed, tmp_path):
    def first_two_only(router, args, output):
        return output - torch.arange(output.shape[1]) * 1e6

    folder = FAMILIES["moe-llava"](tmp_path / "model")
    changed(
        lambda model: [
            module.register_forward_hook(first_two_only)
            for name, module in model.named_modules()
            if name.endswith("router")
        ]
    )
    checkpoint = open_checkpoint(str(folder))
    assert trace(checkpoint) == plugins.topology(checkpoint.config)


def test_a_processor_without_a_template_is_refused(tmp_path):
    folder = write_tiny_llava(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    assert "the processor has no chat template" in complaint(folder) and "conv=" in complaint(folder)
