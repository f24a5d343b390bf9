"""Time to the first token and between tokens."""

import pytest
import torch
from harness.test_wrapper import ask, texts
from tiny_llava import random_image

from qvlm_plugin.harness.provenance import Counts
from qvlm_plugin.harness.timing import FirstToken
from qvlm_plugin.harness.wrapper import QVLMChat


def test_it_notes_the_first_logits_and_changes_none():
    first = FirstToken(torch.device("cpu"))
    scores = torch.randn(2, 5)
    assert first.seconds is None and first(torch.zeros(2, 3), scores) is scores
    noted = first.seconds
    first(torch.zeros(2, 4), scores)
    assert first.seconds == noted > 0


def test_latencies_are_means_over_answers_and_steps():
    one, two = Counts(), Counts()
    assert one.latencies == {}
    one.time_batch(3, 2.0, 0.5, 4)
    two.time_batch(1, 1.5, 1.5, 1)
    assert two.latencies == {"ttft": 1.5}
    total = Counts.total([one, two])
    assert total.latencies == {"ttft": pytest.approx((3 * 0.5 + 1.5) / 4), "tpot": pytest.approx(1.5 / 3)}


def test_the_wrapper_measures_without_changing_answers(tiny_llava, monkeypatch):
    model = QVLMChat(pretrained=str(tiny_llava), dtype="float32", device="cpu", batch_size=2)
    docs = [{"text": f"what is {index}?", "images": [random_image(index)]} for index in range(3)]
    answers = texts(model.generate_until(ask(model, docs, max_new_tokens=6)))
    found, counts = model.record.counts.latencies, model.record.counts
    assert 0 < found["ttft"] < counts.seconds and 0 < found["tpot"] < counts.seconds and counts.answered == 3
    generate = model._model.generate
    monkeypatch.setattr(model._model, "generate", lambda logits_processor, **more: generate(**more))
    assert texts(model.generate_until(ask(model, docs, max_new_tokens=6))) == answers
    assert counts.answered == 3  # nothing was noted without it
