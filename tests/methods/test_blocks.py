import pytest
import torch
from torch import nn

from qvlm_plugin import plugins
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.blocks import Batch, decoder_inputs, output_error, replaced, run_layer
from qvlm_plugin.topology import decoder_layers


@pytest.fixture
def started(loaded, calibration):
    topology = plugins.topology(loaded.model.config)
    return decoder_layers(topology, loaded.model), *decoder_inputs(loaded, topology, calibration, 2)


@torch.no_grad()
def test_layer_by_layer_equals_the_whole_decoder(loaded, calibration, started):
    layers, hidden, batches = started
    for name, layer in layers:
        hidden = run_layer(name, layer, hidden, batches)
    for states, batch, (inputs, _) in zip(hidden, batches, calibration.batches(loaded.processor, 2), strict=True):
        expected = loaded.model(**inputs, output_hidden_states=True).hidden_states[-1]
        final = loaded.model.model.language_model.norm(states)
        assert torch.allclose(final[batch.attended], expected[batch.attended], atol=1e-5)
    assert not any(layer._forward_pre_hooks for _, layer in layers)


def test_masks_tell_images_texts_and_answers_apart(loaded, calibration, started):
    _, _, batches = started
    for batch, (inputs, answer) in zip(batches, calibration.batches(loaded.processor, 2), strict=True):
        assert torch.equal(batch.attended, inputs["attention_mask"].bool())
        assert torch.equal(batch.attended & ~batch.text, inputs["input_ids"] == 3)
        assert torch.equal(batch.answer[:, :-1], answer[:, 1:]) and not batch.answer[:, -1].any()


def test_parameters_given_to_a_run_do_not_stay(started):
    layers, hidden, batches = started
    name, layer = layers[0]
    plain = run_layer(name, layer, hidden, batches)
    zeros = {"mlp.down_proj.weight": torch.zeros_like(layer.mlp.down_proj.weight)}
    assert not torch.equal(run_layer(name, layer, hidden, batches, zeros)[0], plain[0])
    assert torch.equal(run_layer(name, layer, hidden, batches)[0], plain[0])


@torch.no_grad()
def test_what_is_not_finite_is_named(loaded, calibration, started):
    layers, hidden, batches = started
    layers[1][1].mlp.down_proj.weight.fill_(float("inf"))
    hidden = run_layer(*layers[0], hidden, batches)
    with pytest.raises(QVLMError, match=r"the output of model\.language_model\.layers\.1 is not finite") as caught:
        run_layer(*layers[1], hidden, batches)
    assert "\n" not in str(caught.value)
    loaded.model.model.multi_modal_projector.linear_2.bias.fill_(float("nan"))
    with pytest.raises(QVLMError, match=r"the input of model\.language_model\.layers\.0 is not finite"):
        decoder_inputs(loaded, plugins.topology(loaded.model.config), calibration, 2)


def test_padding_may_be_anything(started):
    class Passing(nn.Linear):
        def forward(self, states, **arguments):
            return states

    _, hidden, batches = started
    spoiled = [
        states.masked_fill(~batch.attended.unsqueeze(-1), float("nan"))
        for states, batch in zip(hidden, batches, strict=True)
    ]
    outputs = run_layer("passing", Passing(1, 1), spoiled, batches)
    assert any(states.isnan().any() for states in outputs)


def test_replacing_ends_with_the_context_even_after_an_error(loaded):
    name, norm = "model.vision_tower.encoder.layers.0.mlp.fc1", "model.vision_tower.encoder.layers.0.layer_norm1.weight"
    module, value = loaded.model.get_submodule(name), loaded.model.get_parameter(norm).clone()
    other = nn.Linear(24, 40)
    with pytest.raises(RuntimeError), replaced(loaded.model, {name: other}, {norm: value + 1}):
        assert loaded.model.get_submodule(name) is other
        assert torch.equal(loaded.model.get_parameter(norm), value + 1)
        raise RuntimeError
    assert loaded.model.get_submodule(name) is module and torch.equal(loaded.model.get_parameter(norm), value)


def test_the_error_counts_the_tokens_asked_for():
    attended = torch.tensor([[False, True, True, True]])
    text, answer = torch.tensor([[False, False, True, True]]), torch.tensor([[False, False, False, True]])
    batch = Batch({}, attended, text, answer)
    target, output = torch.ones(1, 4, 3), torch.ones(1, 4, 3) + torch.tensor([9.0, 1.0, 2.0, 3.0]).view(1, 4, 1)
    expected = {"all": 3 * (1 + 4 + 9), "text": 3 * (4 + 9), "answer": 3 * 9}
    for tokens, value in expected.items():
        assert output_error([output], [target], [batch], tokens) == pytest.approx(value)
        assert output_error([output], [target], [batch], tokens, relative=True) == pytest.approx(value / 3)
