"""A model that overflows is an error that names the first layer."""

import pytest
import torch
from tiny_llava import random_image

from qvlm_plugin import planning
from qvlm_plugin.conversation import Conversation, encode
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.finite import finite
from qvlm_plugin.plan_request import check_request

DECODER, TOWER = "model.language_model.layers", "model.vision_tower.encoder.layers"


def batch(loaded):
    prompts = [Conversation.from_prompt("what is shown?", [random_image(0)]), Conversation.from_prompt("and?")]
    return encode(loaded.processor, prompts)[0]


def overflow(model, name):
    """Weights of a size at which the Linear's output exceeds float16."""
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(3e5).clamp_(-6e4, 6e4)


@pytest.mark.parametrize(
    "name", [f"{DECODER}.1.mlp.down_proj", f"{DECODER}.0.self_attn.o_proj", f"{TOWER}.1.mlp.fc2", "lm_head"]
)
@pytest.mark.parametrize("way", ["generate", "forward"])
def test_the_first_layer_that_overflows_is_named(loaded, name, way):
    model, inputs = loaded.model.half(), batch(loaded)
    inputs["pixel_values"] = inputs["pixel_values"].half()
    run = {
        "generate": lambda: model.generate(**inputs, max_new_tokens=3, do_sample=False),
        "forward": lambda: model(**inputs).logits,
    }[way]
    assert torch.equal(finite(model, run), run())
    overflow(model, name)
    with pytest.raises(
        QVLMError, match=rf"the output of {name} is not finite in float16; use dtype=bfloat16"
    ) as caught:
        finite(model, run)
    assert "\n" not in str(caught.value)
    assert not model._forward_hooks and not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks


def test_what_overflows_between_layers_is_named(loaded):
    model, inputs = loaded.model.half(), batch(loaded)
    inputs["pixel_values"] = inputs["pixel_values"].half()
    for name in ("gate_proj", "up_proj"):  # finite each, their product is not
        with torch.no_grad():
            model.get_submodule(f"{DECODER}.0.mlp.{name}").weight.mul_(1e4)
    with pytest.raises(QVLMError, match=rf"the input of {DECODER}.0.mlp.down_proj is not finite in float16"):
        finite(model, lambda: model(**inputs))


def test_weights_that_are_not_finite_are_named(loaded):
    inputs = batch(loaded)
    with torch.no_grad():
        loaded.model.get_submodule(f"{DECODER}.1.mlp.up_proj").weight[0, 0] = torch.nan
    with pytest.raises(QVLMError, match=rf"the weights of {DECODER}.1.mlp.up_proj are not finite in float32$"):
        finite(loaded.model, lambda: loaded.model(**inputs))


def test_sampling_stops_before_it_draws(loaded):
    inputs = batch(loaded)
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(torch.inf)
    with pytest.raises(QVLMError, match="the weights of lm_head"):
        finite(loaded.model, lambda: loaded.model.generate(**inputs, max_new_tokens=2, do_sample=True))


def test_overflow_after_some_tokens_is_found(loaded):
    """The first token is finite; its own embedding is not."""
    model, inputs = loaded.model, batch(loaded)
    first = finite(model, lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False))[0, -1]
    assert not (inputs["input_ids"] == first).any()
    with torch.no_grad():
        model.get_input_embeddings().weight[first] = torch.nan
    with pytest.raises(QVLMError, match=r"the weights of model.language_model.embed_tokens"):
        finite(model, lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False))


def test_padding_may_be_anything(loaded):
    """Only what comes after padding is an answer."""
    inputs = batch(loaded)
    hook = lambda module, args, output: output.masked_fill_((inputs["attention_mask"] == 0).unsqueeze(-1), torch.nan)  # noqa: E731
    loaded.model.lm_head.register_forward_hook(hook)
    assert (inputs["attention_mask"] == 0).any()
    assert finite(loaded.model, lambda: loaded.model(**inputs)).logits.isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "packed"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a4", "w4a16"])
@pytest.mark.parametrize("name", [f"{TOWER}.0.layer_norm1", f"{DECODER}.0.input_layernorm"])
def test_quantized_models_do_not_hide_it(loaded, calibration, backend, scheme, name):
    """Rounding to codes could make numbers of what is none."""
    request = check_request("rtn", scheme, {"calibration_batch_size": 5, "group_size": 32})
    plan = planning.obtain_plan(loaded, request, calibration, cache=None)
    planning.apply(plan, loaded, backend)
    inputs = batch(loaded)
    finite(loaded.model, lambda: loaded.model(**inputs))
    loaded.model.get_submodule(name).weight.fill_(torch.nan)
    with pytest.raises(QVLMError, match=f"the weights of {name}"):
        finite(loaded.model, lambda: loaded.model(**inputs))
