"""The first tokens in full precision: their keys and values, and ranges that do not include them."""

import pytest
import torch
from searching import context_of
from tiny_llava import random_image

from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.minmax import observe


@pytest.fixture
def asked(benchmark_module, loaded):
    question_of = benchmark_module("teacher_forced").question_of
    return [
        question_of(loaded, "task", index, Conversation.from_prompt("what is it? " * (1 + index % 2), images), "a")
        for index, images in enumerate(([], [random_image(1)], [random_image(1)], [random_image(2)]))
    ]


def test_separately_computed_first_tokens_change_no_output(benchmark_module, loaded, asked, monkeypatch):
    sinks, teacher_forced = benchmark_module("sinks"), benchmark_module("teacher_forced")
    seen = []
    head = loaded.model.lm_head.forward
    monkeypatch.setattr(loaded.model.lm_head, "forward", lambda hidden: seen.append(head(hidden)) or seen[-1])
    teacher_forced.exact_matches(loaded.model, asked)
    whole = seen[:]
    for count in (1, int((asked[1].prefix == loaded.model.config.image_token_id).nonzero()[0])):
        first = sinks.first_tokens(loaded.model, asked, count)
        shorter = [first.removed_from(one) for one in asked]
        assert [len(one.prefix) + len(one.tail) + count for one in shorter] == [
            len(one.prefix) + len(one.tail) for one in asked
        ]
        seen.clear()
        teacher_forced.exact_matches(loaded.model, shorter, first.cache)
        torch.testing.assert_close(seen, whole)


def test_rows_are_named_after_their_first_tokens(benchmark_module, tmp_path):
    seeds = benchmark_module("seeds")
    assert all(name in seeds.METHODS and name == f"qlora-sinks{count}" for name, count in seeds.SINKS.items())
    with pytest.raises(QVLMError, match="qlora-sinks1-w4a4-32-0: the harness cannot compute first tokens in full"):
        seeds.agreement(tmp_path, "qlora-sinks1-w4a4-32-0", tmp_path, 1)


def test_prompts_that_begin_otherwise_are_refused(benchmark_module, loaded, asked):
    first = benchmark_module("sinks").first_tokens(loaded.model, asked, 1)
    asked[2].prefix[0] += 1
    with pytest.raises(ValueError, match="task 2: the prompt does not begin as others do"):
        first.removed_from(asked[2])


def test_a_search_does_not_observe_the_first_tokens_of_a_prompt(benchmark_module, loaded, calibration):
    context = context_of(loaded, calibration)
    sites = [site for site in context.sites if site.part == "decoder" or site == context.sites[0]]
    whole = observe(context, sites, Draft())
    with benchmark_module("sinks").unobserved(2):
        shorter = observe(context, sites, Draft())
    for site in sites:
        prompts = len(calibration.samples) if site.part == "decoder" else 0  # the tower reads no tokens of a prompt
        assert shorter[site.name].count == whole[site.name].count - 2 * prompts
    assert observe(context, sites[-1:], Draft())[sites[-1].name].count == whole[sites[-1].name].count
