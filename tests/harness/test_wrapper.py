"""The model wrapper on a tiny LLaVA, fed with the harness's own request objects."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from lmms_eval.api.instance import Instance
from loguru import logger
from tiny_llava import random_image

from qvlm_plugin import planning
from qvlm_plugin.conversation import Conversation, encode, render
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness import provenance
from qvlm_plugin.harness.requests import from_messages, from_visuals
from qvlm_plugin.harness.wrapper import QVLMChat, QVLMSimple
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request

WORDS = ("short", "a somewhat longer question", "what is shown in this picture and why is it there?")


def documents(count):
    """Questions with no, one and two images, of different lengths."""
    return [
        {
            "text": f"{WORDS[i % 3]} ({i})",
            "images": [random_image(10 * i + k, 30 + i) for k in range((0, 1, 2, 1)[i % 4])],
        }
        for i in range(count)
    ]


def to_messages(doc, **_):
    content = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["text"]}]}]


def instance(kind, arguments, doc_id):
    return Instance(kind, arguments, idx=0, metadata={"task": "toy", "doc_id": doc_id, "repeats": 1})


def unprintable(model):
    """Tokens that a random byte-level model must not produce if its answers are to be readable text."""
    tokenizer = model._processor.tokenizer
    return [i for i in range(len(tokenizer)) if i != tokenizer.eos_token_id and not " " <= tokenizer.decode([i]) <= "~"]


def ask(model, docs, ids=None, **generation):
    """Instances to generate, in the model's request format, for the documents ``ids`` of task ``toy``."""
    model.task_dict["toy"] = {"test": docs}
    generation = {"max_new_tokens": 12, "suppress_tokens": unprintable(model), **generation}
    visuals = lambda doc: doc["images"]  # noqa: E731
    rows = range(len(docs)) if ids is None else ids
    if model.is_simple:
        tuples = [(docs[i]["text"], dict(generation), visuals, i, "toy", "test") for i in rows]
    else:
        tuples = [(docs[i]["text"], to_messages, dict(generation), i, "toy", "test") for i in rows]
    return [instance("generate_until", arguments, arguments[-3]) for arguments in tuples]


def texts(results):
    return [result.text for result in results]


@pytest.fixture(scope="module")
def chat(make):
    return make(batch_size=4)


@pytest.fixture(scope="module")
def simple(make):
    return make(QVLMSimple, batch_size=4)


def plain_generate(model, doc, **arguments):
    """Tokens of the prompt and of the answer, by transformers alone, one document at a time."""
    conversation = from_visuals(doc["text"], doc["images"])
    prompt = render(model._processor, conversation)
    inputs = model._processor(text=[prompt], images=doc["images"] or None, return_tensors="pt")
    output = model._model.generate(**inputs, do_sample=False, suppress_tokens=unprintable(model), **arguments)
    return inputs["input_ids"][0], output[0, inputs["input_ids"].shape[1] :]


def without_padding(row):
    return tuple(row[row != 0].tolist())


@pytest.mark.parametrize("format", ["chat", "simple"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_equals_plain_transformers_token_for_token(make, monkeypatch, format, batch_size):
    model = make(QVLMSimple if format == "simple" else QVLMChat, batch_size=batch_size)
    docs = documents(24)
    produced = {}
    generate = model._model.generate

    def spy(**arguments):
        output = generate(**arguments)
        width = arguments["input_ids"].shape[1]
        for prompt, answer in zip(arguments["input_ids"], output[:, width:], strict=True):
            produced[without_padding(prompt)] = without_padding(answer)
        return output

    monkeypatch.setattr(model._model, "generate", spy)
    results = model.generate_until(ask(model, docs))
    monkeypatch.undo()
    for doc, result in zip(docs, results, strict=True):
        prompt, answer = plain_generate(model, doc, max_new_tokens=12)
        assert produced[without_padding(prompt)] == tuple(answer.tolist())
        assert result.text == model._processor.tokenizer.decode(answer, skip_special_tokens=True)
        assert result.token_counts.input_tokens == len(prompt)
        assert result.token_counts.output_tokens == len(answer)


def test_compiled_decoding_gives_the_same_answers(chat, make):
    """With the compiler that runs by default; `test_full_precision` has other sizes of batches, and all families."""
    docs = documents(4)
    expected = texts(chat.generate_until(ask(chat, docs)))
    torch.compiler.reset()
    compiled = make(batch_size=4, compile=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for _ in range(3):  # after the first time nothing is compiled
        assert texts(compiled.generate_until(ask(compiled, docs))) == expected
        graphs, counts = counters["stats"]["unique_graphs"], compiled.record.counts
    assert 1 <= graphs <= 4 and counts.compile_seconds > 0
    assert len(counts.latencies) >= 2 and sum(one.per_token for one in counts.latencies) < counts.compile_seconds
    assert compiled.record.facts["compile"] and not chat.record.facts["compile"]


def test_answers_keep_the_order_of_requests(chat):
    docs = documents(9)
    alone = [texts(chat.generate_until(ask(chat, docs, [i])))[0] for i in range(9)]
    assert len(set(alone)) == 9
    shuffled = [5, 0, 8, 3, 1, 7, 2, 6, 4]
    assert texts(chat.generate_until(ask(chat, docs, shuffled))) == [alone[i] for i in shuffled]


def test_requests_with_different_generation_arguments(chat):
    docs = documents(6)
    mixed = ask(chat, docs, [0, 1, 2], max_new_tokens=3) + ask(chat, docs, [3, 4, 5], max_new_tokens=7)
    counts = [result.token_counts.output_tokens for result in chat.generate_until(mixed)]
    assert counts == [3, 3, 3, 7, 7, 7]


def test_images_matter(chat):
    docs = [{"text": "the same words", "images": [random_image(i)]} for i in range(2)]
    docs.append({"text": "the same words", "images": []})
    assert len(set(texts(chat.generate_until(ask(chat, docs))))) == 3


def test_both_formats_agree(chat, simple):
    docs = documents(6)
    assert texts(chat.generate_until(ask(chat, docs))) == texts(simple.generate_until(ask(simple, docs)))


ODD_TEXTS = [
    ("What does the tag <image> do?", 0),
    ("<image>\nIs <image> a tag?", 1),
    ("Look at <image> and tell me.", 1),
    ("Is <image> or <image> larger?\n<image>", 3),
    ("Is </s> or <pad> or <s><image> a token?", 2),
]


def test_special_tokens_in_questions_are_text_and_images_keep_their_positions(chat, simple):
    docs = [{"text": text, "images": [random_image(i) for i in range(count)]} for text, count in ODD_TEXTS]
    answers = texts(chat.generate_until(ask(chat, docs, max_new_tokens=4)))
    assert answers == texts(simple.generate_until(ask(simple, docs, max_new_tokens=4)))
    processor = chat._processor
    for doc in docs:
        (simple_form, chat_form) = from_visuals(doc["text"], doc["images"]), from_messages(to_messages(doc))
        assert simple_form.messages == chat_form.messages and simple_form.digest() == chat_form.digest()
        ids = encode(processor, [chat_form])[0]["input_ids"][0]
        assert (ids == 3).sum() == 4 * len(doc["images"]) and not torch.isin(ids, torch.tensor([0, 1, 2])).any()


def test_messages_with_positioned_images_are_unchanged():
    image = {"type": "image", "url": random_image(0)}
    parts = [{"type": "text", "text": "Is <image> this"}, image, {"type": "text", "text": "?"}]
    content = from_messages([{"role": "user", "content": parts}]).messages[0]["content"]
    assert content == [parts[0], {"type": "image"}, parts[2]]


def test_continuations_that_name_special_tokens_are_scored_as_text(simple):
    simple.task_dict["toy"] = {"test": documents(2)}
    requests = [
        instance("loglikelihood", ("Is it?", text, lambda doc: doc["images"], 1, "toy", "test"), 1)
        for text in (" <image>", " </s> yes")
    ]
    assert all(score.log_probability < 0 for score in simple.loglikelihood(requests))


def test_prompts_longer_than_the_context_are_counted(make, tmp_path):
    model = make(batch_size=2)
    assert model.record.facts["context_length"] == 512
    docs = [{"text": "why " * count, "images": [random_image(0)]} for count in (1, 130, 60, 140)]
    model.generate_until(ask(model, docs, max_new_tokens=2))
    assert model.record.counts.over_context == {"toy": 2}
    messages = []
    sink = logger.add(messages.append, level="WARNING", format="{message}")
    model.record.finish(model._model)
    logger.remove(sink)
    assert any("task toy: 2 prompts exceed the model's context of 512 tokens;" in text for text in messages)
    assert model.record.report({})["prompts_over_context"] == {"toy": 2}


def test_until_cuts_the_answer_and_ends_generation(chat):
    docs, forty = documents(8), {"max_new_tokens": 40, "min_new_tokens": 40}
    free = chat.generate_until(ask(chat, docs, **forty))
    stops = [result.text[10:13] for result in free]
    for i, (result, stop) in enumerate(zip(free, stops, strict=True)):
        for until in ([stop], stop, ["never", stop]):
            stopped = chat.generate_until(ask(chat, docs, [i], **forty, until=until))[0]
            assert stopped.text == result.text[: result.text.find(stop)]
        assert stopped.token_counts.output_tokens < result.token_counts.output_tokens
    # rows of one batch end independently of each other
    together = chat.generate_until(ask(chat, docs, **forty, until=stops[:1]))
    for result, alone in zip(together, free, strict=True):
        assert result.text == alone.text.split(stops[0])[0]


def test_until_looks_at_the_answer_only(chat):
    docs = documents(12)
    free = texts(chat.generate_until(ask(chat, docs)))
    checked = 0
    for i, text in enumerate(free):
        if ":" not in text:
            stop = ":" + text[0]  # the prompt ends in "ASSISTANT:", so prompt and answer together hold this string
            assert texts(chat.generate_until(ask(chat, docs, [i], until=[stop, "ASSISTANT:"]))) == [text]
            checked += 1
    assert checked > 2


def test_sampling_is_reproducible_and_follows_the_harness_seed(chat):
    docs = documents(4)

    def sample(harness_seed, **arguments):
        torch.manual_seed(harness_seed)  # as lmms-eval does at the start of a run
        torch.rand(harness_seed + 1)  # and whatever loading drew
        return texts(chat.generate_until(ask(chat, docs, **arguments)))

    greedy = texts(chat.generate_until(ask(chat, docs)))
    assert sample(1, do_sample=True) == sample(1, do_sample=True)
    assert sample(1, do_sample=True) != sample(2, do_sample=True)
    assert sample(1, temperature=1.5) not in (greedy, sample(1, temperature=0.5))
    assert sample(1, do_sample=True, seed=5) == sample(2, do_sample=True, seed=5)
    assert sample(1, do_sample=True, temperature=0, top_p=0.5) == greedy
    assert sample(1, do_sample=True, top_k=1) == greedy
    assert sample(1, do_sample=False, temperature=0.7) == greedy


def test_beam_search(make):
    model, docs = make(batch_size=2), documents(4)
    results = model.generate_until(ask(model, docs, num_beams=3, until=["never"]))
    for doc, result in zip(docs, results, strict=True):
        _, answer = plain_generate(model, doc, max_new_tokens=12, num_beams=3)
        assert result.text == model._processor.tokenizer.decode(answer, skip_special_tokens=True)


STEERED = {"repetition_penalty": 1.9, "no_repeat_ngram_size": 2, "num_beams": 3, "min_new_tokens": 12}


@pytest.mark.parametrize(
    "steered", [STEERED, {"do_sample": True, "temperature": 5.0}, {"bad_words_ids": [[40], [41]], "max_length": 3}]
)
def test_a_checkpoints_generation_config_is_ignored_with_a_warning(make, tiny_llava, tmp_path, steered):
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | steered))
    docs, said = documents(3), []
    sink = logger.add(said.append, level="WARNING")
    plain, model = make(), make(pretrained=str(folder))
    logger.remove(sink)
    assert texts(model.generate_until(ask(model, docs))) == texts(plain.generate_until(ask(plain, docs)))
    assert model.record.facts["generation_config_ignored"] == steered
    assert plain.record.facts["generation_config_ignored"] == {}
    assert len(said) == 1 and all(f"{name}={value}" in said[0] for name, value in steered.items())
    assert model.record.facts["eos_token_id"] == plain.record.facts["eos_token_id"] == 2
    assert model.response_identity() != plain.response_identity()


def test_generation_arguments_of_a_task_are_applied_and_recorded(make):
    model, docs = make(), documents(3)
    plain = texts(model.generate_until(ask(model, docs)))
    penalized = texts(model.generate_until(ask(model, docs, repetition_penalty=1.9, until="x")))
    assert penalized != plain
    model.generate_until(ask(model, docs, repetition_penalty=1.9, until="x"))
    first, second = model.record.counts.generation["toy"]
    assert {"max_new_tokens": 12, "do_sample": False, "until": [], "skip_special_tokens": True}.items() <= first.items()
    assert second["repetition_penalty"] == 1.9 and second["until"] == ["x"]
    twice = provenance.Counts.total([model.record.counts, model.record.counts])
    assert twice.generation == model.record.counts.generation


def test_default_answer_length(make):
    model, docs = make(max_new_tokens=5), documents(1)
    request = ask(model, docs)
    del request[0].arguments[2]["max_new_tokens"]
    assert model.generate_until(request)[0].token_counts.output_tokens == 5


def test_system_prompt(make, tmp_path):
    (tmp_path / "system.txt").write_text("Answer, briefly.\n")
    docs = documents(2)
    spoken, written = make(system_prompt="Answer briefly."), make(system_prompt=str(tmp_path / "system.txt"))
    answers = [texts(model.generate_until(ask(model, docs))) for model in (spoken, written, make())]
    assert answers[0] != answers[1] != answers[2] != answers[0]
    assert written.record.facts["system_prompt"] == "Answer, briefly."


def score(model, docs, continuations):
    model.task_dict["toy"] = {"test": docs}
    visuals = lambda doc: doc["images"]  # noqa: E731
    tuples = [
        (doc["text"], c, visuals, i, "toy", "test") for i, (doc, c) in enumerate(zip(docs, continuations, strict=True))
    ]
    return model.loglikelihood([instance("loglikelihood", arguments, arguments[3]) for arguments in tuples])


def plain_score(model, doc, continuation):
    """Log-probability and greedy flag from one unpadded forward pass."""
    processor, conversation = model._processor, from_visuals(doc["text"], doc["images"])
    prompt = render(processor, conversation)
    images = doc["images"] or None
    start = processor(text=[prompt], images=images, return_tensors="pt")["input_ids"].shape[1]
    inputs = processor(text=[prompt + continuation], images=images, return_tensors="pt")
    with torch.no_grad():
        logits = model._model(**inputs).logits[0, start - 1 : -1].log_softmax(-1)
    targets = inputs["input_ids"][0, start:]
    return logits.gather(-1, targets[:, None]).sum().item(), bool((logits.argmax(-1) == targets).all())


def test_loglikelihood_equals_a_plain_computation(simple):
    docs = documents(12)
    greedy = texts(simple.generate_until(ask(simple, docs, max_new_tokens=1)))
    continuations = [" A", " a long continuation", "B.", " C"] * 2 + greedy[8:]
    results = score(simple, docs, continuations)
    for doc, continuation, (log_probability, is_greedy) in zip(docs, continuations, results, strict=True):
        expected, expected_greedy = plain_score(simple, doc, continuation)
        assert log_probability == pytest.approx(expected, abs=1e-4)
        assert is_greedy == expected_greedy
    flags = [flag for _, flag in results]
    assert any(flags) and not all(flags)
    assert simple.loglikelihood([]) == []


def test_loglikelihood_of_a_text_alone_and_of_a_target(simple):
    docs = documents(2)
    alone = simple.loglikelihood([instance("loglikelihood", ("", "red"), 0)])[0]
    assert alone[0] == pytest.approx(plain_score(simple, {"text": "", "images": []}, "red")[0], abs=1e-4)
    simple.task_dict["toy"] = {"test": docs}
    target = instance(
        "loglikelihood", (docs[1]["text"], lambda doc: " yes", lambda d: d["images"], 1, "toy", "test"), 1
    )
    assert simple.loglikelihood([target])[0][0] == pytest.approx(plain_score(simple, docs[1], " yes")[0], abs=1e-4)


def rounds(doc, *, round_idx=None, previous_output=None, previous_round_info=None, **_):
    """The harness's protocol of multi-round tasks: one more round than the document has images."""
    info = (previous_round_info or 0) + 1
    assert len(previous_output) == round_idx == info
    finished = round_idx > len(doc["images"])
    return (None, None, True, previous_output, None) if finished else (
        doc["images"][:1], f"and now? {previous_output[-1]}", False, previous_output, info
    )  # fmt: skip


def test_multi_round_simple(simple):
    docs = documents(4)
    requests = ask(simple, docs)
    for request in requests:
        request.arguments = (*request.arguments[:3], rounds, *request.arguments[3:])
    answers = simple.generate_until_multi_round(requests)
    assert [len(rows) for rows in answers] == [1 + len(doc["images"]) for doc in docs]
    first = texts(simple.generate_until(ask(simple, docs)))
    assert [rows[0] for rows in answers] == first
    second = {"text": f"and now? {first[1]}", "images": docs[1]["images"][:1]}
    assert texts(simple.generate_until(ask(simple, [second]))) == [answers[1][1]]


def test_multi_round_failure_is_named(simple):
    def fail(*_, **__):
        raise KeyError("state")

    request = ask(simple, documents(1))[0]
    request.arguments = (*request.arguments[:3], fail, *request.arguments[3:])
    with pytest.raises(QVLMError, match=r"document 0 of task toy: round 2 cannot be prepared: 'state'"):
        simple.generate_until_multi_round([request])


def test_multi_round_chat(chat, simple):
    docs = documents(4)

    def messages(doc, *, round_idx=None, **state):
        if round_idx is None:
            return to_messages(doc)
        visuals, text, finished, kept, info = rounds(doc, round_idx=round_idx, **state)
        return (None if finished else to_messages({"text": text, "images": visuals})), finished, kept, info

    chat_requests, simple_requests = ask(chat, docs), ask(simple, docs)
    for request in chat_requests:
        request.arguments = (request.arguments[0], messages, *request.arguments[2:])
    for request in simple_requests:
        request.arguments = (*request.arguments[:3], rounds, *request.arguments[3:])
    expected = simple.generate_until_multi_round(simple_requests)
    assert chat.generate_until_multi_round(chat_requests) == expected


def test_unreadable_document_is_named(chat):
    docs = documents(3)
    docs[1]["images"] = ["missing.png"]
    with pytest.raises(QVLMError, match="document 1 of task toy cannot be prepared") as caught:
        chat.generate_until(ask(chat, docs))
    assert "\n" not in str(caught.value)
    docs[1]["images"] = [{"type": "video", "url": "a.mp4"}]
    with pytest.raises(QVLMError, match=r"document 1 of task toy.*contains video"):
        chat.generate_until(ask(chat, [docs[0], docs[1] | {"text": "x"}]))


def test_failing_generation_is_an_error_that_names_the_documents(make, monkeypatch):
    model = make(batch_size=2)

    def fail(**_):
        raise ValueError("no luck")

    monkeypatch.setattr(model._model, "generate", fail)
    with pytest.raises(RuntimeError, match=r"document 0 of task toy.*ValueError: no luck"):
        model.generate_until(ask(model, documents(1)))
    monkeypatch.setattr("qvlm_plugin.harness.processes.count", lambda: 2)
    with pytest.raises(SystemExit, match="1"):  # which, unlike an exception, lmms-eval lets through to torchrun
        model.generate_until(ask(model, documents(1)))


def test_unknown_generation_argument_is_refused_before_any_answer(make, monkeypatch):
    model = make()
    monkeypatch.setattr(model, "_answer", lambda *_: pytest.fail("generated before checking"))
    requests = ask(model, documents(2))
    requests[1].arguments[2]["creativity"] = 11
    with pytest.raises(QVLMError, match="task toy: unknown generation argument creativity; allowed are until"):
        model.generate_until(requests)
    with pytest.raises(QVLMError, match="num_return_sequences must be 1"):
        model.generate_until(ask(model, documents(1), num_return_sequences=2))
    monkeypatch.undo()
    assert model.generate_until(ask(model, documents(1), image_aspect_ratio="pad", top_p=None))[0].text


def test_documents_that_were_calibrated_on_are_refused_before_generating(make, monkeypatch):
    docs = documents(4)
    for allowed in (False, True):
        model = make(QVLMSimple, allow_overlap=allowed)
        digest = Conversation.from_prompt(docs[2]["text"], docs[2]["images"]).digest()
        monkeypatch.setattr(model.record, "calibration_digests", frozenset([digest]))
        if allowed:
            model.generate_until(ask(model, docs))
            assert model.record.counts.overlapping == ["document 2 of task toy"]
        else:
            monkeypatch.setattr(model, "_answer", lambda *_: pytest.fail("generated before checking"))
            with pytest.raises(QVLMError, match=r"1 of the documents.*document 2 of task toy.*allow_overlap=true"):
                model.generate_until(ask(model, docs))
        assert len(model.record.counts.compared) == 4


def test_padding_requests_are_answered_but_not_counted(chat, make):
    model, docs = make(), documents(2)
    requests = ask(model, docs)
    requests[1].metadata["__padding_only__"] = True
    assert len(model.generate_until(requests)) == 2
    assert model.record.counts.generated == {"toy": 1}


def test_cache_hook_hears_of_every_answer(make):
    model, docs, heard = make(), documents(2), []
    model.set_cache_hook(SimpleNamespace(add_partial=lambda *arguments: heard.append(arguments)))
    results = model.generate_until(ask(model, docs))
    assert [(name, key[0], text) for name, key, text in heard] == [
        ("generate_until", doc["text"], result.text) for doc, result in zip(docs, results, strict=True)
    ]


def test_clean_frees_the_model(make):
    model = make()
    assert sum(isinstance(value, torch.nn.Module) for value in vars(model).values()) == 1
    model.clean()
    assert not any(isinstance(value, torch.nn.Module) for value in vars(model).values())
    assert model.record.measured["weight_bytes"] > 0
    assert model.record.facts["preparation_peak_bytes"] > 0


def test_quantized_answers_do_not_depend_on_the_batch(tiny_llava, make, tmp_path):
    """The whole way: calibration file, search, cached plan, quantized generation in batches of 1 and 8."""
    for i in range(4):
        random_image(500 + i, 32).save(tmp_path / f"{i}.png")
    rows = [
        {
            "image": f"{i}.png",
            "conversations": [{"from": "human", "value": f"<image>\nwhat? {i}"}, {"from": "gpt", "value": "that"}],
        }
        for i in range(4)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = {
        "method": "rtn", "scheme": "w6a6", "calibration": f"{tmp_path}/rows.json:4", "cache": str(tmp_path / "cache"),
        "calibration_batch_size": 4,
    }  # fmt: skip
    docs = documents(12)
    one, eight = make(batch_size=1, **arguments), make(batch_size=8, **arguments)
    answers = texts(one.generate_until(ask(one, docs)))
    assert answers == texts(eight.generate_until(ask(eight, docs)))
    full = make(batch_size=8)
    assert answers != texts(full.generate_until(ask(full, docs)))
    assert one.record.facts["search_seconds"] == eight.record.facts["search_seconds"] > 0  # found in the cache
    assert one.record.facts["plan_hash"] == eight.record.facts["plan_hash"] != full.record.facts["plan_hash"]
    assert one.record.calibration_digests and one.record.facts["calibration"]["documents"] == 4
    assert one.response_identity() != full.response_identity()


def test_a_plan_that_was_searched_on_other_prompts_is_run_with_a_warning(tiny_llava, make, calibration, tmp_path):
    request = check_request("rtn", "w8a8", {"calibration_batch_size": 5})
    searched = load(str(tiny_llava), dtype="float32", conv="vicuna_v1")
    planning.obtain_plan(searched, request, calibration, cache=None).save(tmp_path / "plan")
    said = []
    sink = logger.add(said.append, level="WARNING")
    try:
        same = make(plan=str(tmp_path / "plan"), conv="vicuna_v1")
        assert not said and same.record.facts["calibration"]["conv"] == same.record.facts["conv"] == "vicuna_v1"
        make(plan=str(tmp_path / "plan"))
    finally:
        logger.remove(sink)
    assert len(said) == 1 and "searched on prompts of conv=vicuna_v1" in said[0]


def test_encode_is_shared_with_calibration(chat):
    """What the wrapper feeds the model is what `encode` makes of the conversation."""
    doc = documents(2)[1]
    expected, _ = encode(chat._processor, [from_visuals(doc["text"], doc["images"])])
    prompt, _ = plain_generate(chat, doc, max_new_tokens=1)
    assert torch.equal(expected["input_ids"][0], prompt)


@pytest.mark.parametrize("way", ["generate", "score"])
def test_answers_of_a_model_that_overflows_are_an_error_that_names_document_and_layer(make, way):
    model, docs = make(QVLMSimple, batch_size=2, dtype="float16"), documents(3)
    name = "model.language_model.layers.1.mlp.down_proj"
    with torch.no_grad():
        model._model.get_submodule(name).weight.fill_(6e4)
    with pytest.raises(RuntimeError, match=rf"document \d of task toy.*the output of {name} is not finite in float16"):
        model.generate_until(ask(model, docs)) if way == "generate" else score(model, docs, ["yes", "no", "maybe"])


def test_a_checkpoint_that_cannot_run_is_found_before_calibration(tiny_llava, tmp_path, make, monkeypatch):
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_token_index": 9}))
    monkeypatch.setattr("qvlm_plugin.harness.wrapper.read_calibration", lambda *_: pytest.fail("read samples"))
    with pytest.raises(QVLMError, match="no image token"):
        make(pretrained=str(folder), method="qlora", calibration="scienceqa:train:4")
