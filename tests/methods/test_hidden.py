from dataclasses import replace

import pytest
import torch
from searching import context_of
from torch import nn

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.footprint import Footprint
from qvlm_plugin.methods.hidden import Batch, HiddenCache, block_inputs, rows_of
from qvlm_plugin.methods.options import MethodOptions


@pytest.fixture
def started(loaded, calibration):
    context = context_of(loaded, calibration)
    return context.layers, block_inputs(context)


@torch.no_grad()
def test_layer_by_layer_equals_the_whole_decoder(loaded, calibration, started):
    layers, hidden = started
    for name, layer in layers:
        hidden = hidden.through(name, layer)
    for index, (inputs, _) in enumerate(calibration.batches(loaded.processor, 2)):
        expected = loaded.model(**inputs, output_hidden_states=True).hidden_states[-1]
        final, attended = loaded.model.model.language_model.norm(hidden.states[index]), hidden.batches[index].attended
        assert torch.allclose(final[attended], expected[attended], atol=1e-5)
    assert not any(layer._forward_pre_hooks for _, layer in layers)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_rows_at_a_time_compute_the_same_to_the_bit(loaded, calibration, rows):
    context = context_of(loaded, calibration, calibration_batch_size=5)
    small = replace(context, footprint=Footprint(caches_on_cpu=True, rows=rows))
    whole, pieces = block_inputs(context), block_inputs(small)
    assert len(list(whole.pieces())) == 1 and len(list(pieces.pieces())) == -(-5 // rows)
    for name, layer in context.layers:
        whole, pieces = whole.through(name, layer), pieces.through(name, layer)
        assert all(torch.equal(one, other) for one, other in zip(whole.states, pieces.states, strict=True))
    assert torch.equal(whole.tokens(), pieces.tokens())


def test_only_what_belongs_to_single_samples_is_cut():
    count = torch.arange(3)
    arguments = {
        "mask": torch.randn(3, 1, 4, 4),
        "turns": (torch.randn(1, 4, 2), torch.randn(3, 4, 2)),
        "places": count,
    }
    part = rows_of(arguments, 1, 2, 3)
    assert torch.equal(part["mask"], arguments["mask"][1:2]) and torch.equal(
        part["turns"][1], arguments["turns"][1][1:2]
    )
    assert part["turns"][0] is arguments["turns"][0] and part["places"] is count


def test_masks_tell_images_texts_and_answers_apart(loaded, calibration, started):
    _, hidden = started
    for batch, (inputs, answer) in zip(hidden.batches, calibration.batches(loaded.processor, 2), strict=True):
        assert torch.equal(batch.attended, inputs["attention_mask"].bool())
        assert torch.equal(batch.attended & ~batch.text, inputs["input_ids"] == 3)
        assert torch.equal(batch.answer[:, :-1], answer[:, 1:]) and not batch.answer[:, -1].any()


def test_parameters_given_to_a_run_do_not_stay(started):
    (named, *_), hidden = started
    plain = hidden.through(*named).states[0]
    zeros = {"mlp.down_proj.weight": torch.zeros_like(named[1].mlp.down_proj.weight)}
    assert not torch.equal(hidden.through(*named, zeros).states[0], plain)
    assert torch.equal(hidden.through(*named).states[0], plain)


@torch.no_grad()
def test_what_is_not_finite_is_named(loaded, calibration, started):
    layers, hidden = started
    layers[1][1].mlp.down_proj.weight.fill_(float("inf"))
    hidden = hidden.through(*layers[0])
    with pytest.raises(QVLMError, match=r"the output of model\.language_model\.layers\.1 is not finite") as caught:
        hidden.through(*layers[1])
    assert "\n" not in str(caught.value)
    loaded.model.model.multi_modal_projector.linear_2.bias.fill_(float("nan"))
    with pytest.raises(QVLMError, match=r"the input of model\.language_model\.layers\.0 is not finite"):
        block_inputs(context_of(loaded, calibration))


def test_padding_may_be_anything(started):
    class Passing(nn.Linear):
        def forward(self, states, **arguments):
            return states

    (named, *_), hidden = started
    spoiled = [
        states.masked_fill(~batch.attended.unsqueeze(-1), float("nan"))
        for states, batch in zip(hidden.states, hidden.batches, strict=True)
    ]
    outputs = replace(hidden, states=spoiled).through(named[0], Passing(1, 1))
    assert any(states.isnan().any() for states in outputs.states)


def test_the_error_counts_the_tokens_asked_for():
    attended = torch.tensor([[False, True, True, True]])
    text, answer = torch.tensor([[False, False, True, True]]), torch.tensor([[False, False, False, True]])
    batch = Batch({}, {}, attended, text, answer)
    target, output = torch.ones(1, 4, 3), torch.ones(1, 4, 3) + torch.tensor([9.0, 1.0, 2.0, 3.0]).view(1, 4, 1)
    states, wanted = HiddenCache([output], [batch]), HiddenCache([target], [batch])
    expected = {"all": 3 * (1 + 4 + 9), "text": 3 * (4 + 9), "answer": 3 * 9}
    for tokens, value in expected.items():
        assert states.error(wanted, MethodOptions(tokens=tokens)) == pytest.approx(value)
        relative = MethodOptions(tokens=tokens, relative_error=True)
        assert states.error(wanted, relative) == pytest.approx(value / 3)
