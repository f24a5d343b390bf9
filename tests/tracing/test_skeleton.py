import resource

import pytest
import torch
from tiny_llava import write_tiny_llava
from transformers import AutoConfig, LlavaForConditionalGeneration

from qvlm_plugin.tracing.skeleton import RandomProducts, skeleton


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return AutoConfig.from_pretrained(write_tiny_llava(tmp_path_factory.mktemp("skeleton") / "model"))


def inputs():
    ids = torch.tensor([[3, 3, 3, 3, 5, 6, 7]])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def logits(model, given):
    with RandomProducts():
        return model(**given).logits


def test_runs_are_alike_finite_and_depend_on_images_and_text(config):
    model, given = skeleton(config, LlavaForConditionalGeneration), inputs()
    usual = logits(model, given)
    assert usual.isfinite().all() and torch.equal(usual, logits(model, given))
    assert not torch.equal(usual[:, -1], logits(model, given | {"pixel_values": given["pixel_values"].flip(-1)})[:, -1])
    assert usual.std() > 0.1


def test_products_are_linear_and_of_full_width():
    x, y = torch.randn(2, 3, 16)
    linear = torch.nn.Linear(16, 24)

    def product(value):
        with RandomProducts():
            return linear(value)

    assert product(x).shape == (3, 24)
    assert torch.allclose(product(2 * x - y), 2 * product(x) - product(y), atol=1e-5)
    assert (product(torch.eye(16)).abs().sum(dim=1) > 0).all()  # every channel is read
    with RandomProducts():
        assert not torch.equal(linear(x), linear(x))  # the second Linear that runs has another matrix


def test_a_wide_model_takes_little_memory(config):
    config.text_config.hidden_size, config.text_config.intermediate_size = 8192, 28672
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = 64
    config.text_config.head_dim = 128
    model = skeleton(config, LlavaForConditionalGeneration)
    elements = sum(parameter.numel() for parameter in model.parameters())
    held = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    assert elements > 1.5e9 and held < 2e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert logits(model, inputs()).isfinite().all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; its weights would take 7 GB


def test_the_configuration_stays_as_it_is(config):
    before = config.to_dict()
    skeleton(config, LlavaForConditionalGeneration, tokens=1000)
    assert config.to_dict() == before
