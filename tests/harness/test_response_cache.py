"""lmms-eval's own cache in front of the tiny model: what it keeps, and what a resumed run knows."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from harness.test_wrapper import ask, documents, instance, score, texts
from lmms_eval.api.instance import Instance
from lmms_eval.caching.response_cache import ResponseCache
from tiny_llava import random_image

from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness import response_cache
from qvlm_plugin.harness.manifest import MODEL_ID
from qvlm_plugin.harness.wrapper import QVLMSimple


@pytest.fixture
def open_cache(tmp_path):
    """Opens the cache as the harness does at the beginning of a run."""
    opened = []

    def create():
        response_cache.install()
        opened.append(ResponseCache.create(str(tmp_path / "responses"), model=MODEL_ID, model_args="pretrained=x"))
        return opened[-1]

    yield create
    for cache in opened:
        cache.close()


def run(cache, model, docs, kind="generate_until", **generation):
    """A run through the cache to its end, as the harness ends it."""
    succeeded = False
    try:
        responses = cache.execute(model, kind, ask(model, docs, **generation))
        succeeded = True
    finally:
        cache.finalize(success=succeeded)
    return [response if isinstance(response, str) else response.text for response in responses]


def unreadable(docs, index, image="missing.png"):
    return [doc | {"images": [image]} if number == index else doc for number, doc in enumerate(docs)]


def test_installing_is_idempotent():
    response_cache.install()
    wrapped = ResponseCache.execute, ResponseCache.create
    response_cache.install()
    assert wrapped == (ResponseCache.execute, ResponseCache.create)


@pytest.mark.parametrize("bad", [11, 0])
def test_one_bad_document_does_not_lose_the_others(make, open_cache, monkeypatch, bad):
    docs, model = documents(12), make(batch_size=2)
    with pytest.raises(QVLMError, match=f"document {bad} of task toy cannot be prepared"):
        run(open_cache(), model, unreadable(docs, bad))
    expected = texts(model.generate_until(ask(model, docs)))

    again = make(batch_size=2)
    asked, answer = [], again._answer
    monkeypatch.setattr(again, "_answer", lambda batch: asked.extend(item.doc_id for item in batch) or answer(batch))
    assert run(open_cache(), again, docs) == expected
    assert bad in asked and len(asked) <= 2  # the batch of the bad one


def test_a_failing_generation_does_not_lose_the_others(make, open_cache, monkeypatch):
    docs, model = documents(6), make()
    answer = model._answer

    def fail(batch):
        if batch[0].doc_id == 2:
            raise RuntimeError("generation failed for document 2 of task toy: CUDA out of memory")
        return answer(batch)

    monkeypatch.setattr(model, "_answer", fail)
    with pytest.raises(RuntimeError, match="document 2 of task toy"):
        run(open_cache(), model, docs)
    again = make()
    run(open_cache(), again, docs)
    assert again.record.counts.generated == {"toy": 1} and again.record.counts.found == {"toy": 5}


def test_a_model_that_overflows_ends_the_run(make, open_cache, monkeypatch):
    model, tried = make(dtype="float16"), []
    with torch.no_grad():
        model._model.get_submodule("model.language_model.layers.1.mlp.down_proj").weight.fill_(6e4)
    answer = model._answer
    monkeypatch.setattr(model, "_answer", lambda batch: tried.append(batch) or answer(batch))
    with pytest.raises(RuntimeError, match="is not finite in float16"):
        run(open_cache(), model, documents(6))
    assert len(tried) == 1


def test_answers_of_a_killed_run_are_there(make, open_cache):
    docs, model = documents(4), make()
    open_cache().execute(model, "generate_until", ask(model, docs[:3]))  # and no end
    again = make()
    run(open_cache(), again, docs)
    assert again.record.counts.found == {"toy": 3}


def test_a_shard_that_cannot_be_read_is_left_alone(open_cache, make, tmp_path):
    (tmp_path / "responses" / "runs" / "damaged").mkdir(parents=True)
    (tmp_path / "responses" / "runs" / "damaged" / "rank_0.db").write_bytes(b"no database " * 100)
    run(open_cache(), make(), documents(1))


def test_a_resumed_run_records_the_same_as_an_uninterrupted_one(make, open_cache, monkeypatch):
    docs, whole, resumed = documents(8), make(batch_size=4), make(batch_size=4)
    docs[3]["images"] = docs[1]["images"]  # two questions about one picture
    digest = Conversation.from_prompt(docs[6]["text"], docs[6]["images"]).digest()
    for model in (whole, resumed):
        monkeypatch.setattr(model.record, "calibration_digests", frozenset(["of another"]))
    expected = texts(whole.generate_until(ask(whole, docs)))
    run(open_cache(), make(batch_size=4), docs)
    assert run(open_cache(), resumed, docs) == expected
    for part in ("images", "compared", "unreadable", "generation"):
        assert getattr(resumed.record.counts, part) == getattr(whole.record.counts, part), part
    counts = resumed.record.counts
    assert counts.found["toy"] + counts.generated["toy"] == whole.record.counts.generated["toy"] == 8
    assert counts.found["toy"] >= 7  # lmms-eval does not keep empty answers
    images = resumed.record.counts.images
    assert resumed.record.report({})["prompts_over_context"] == {"toy": None}
    assert whole.record.report({})["prompts_over_context"] == {"toy": 0}
    assert images["toy", 1] == images["toy", 3] != images["toy", 2] and images["toy", 0] is None

    guarded = make(batch_size=4)
    monkeypatch.setattr(guarded.record, "calibration_digests", frozenset([digest]))
    with pytest.raises(QVLMError, match="document 6 of task toy"):
        run(open_cache(), guarded, docs)


def test_images_are_known_without_calibration_too(make, open_cache):
    docs = documents(5)
    run(open_cache(), make(QVLMSimple), docs)
    resumed = make(QVLMSimple)
    run(open_cache(), resumed, docs)
    assert [resumed.record.counts.images["toy", index] is None for index in range(5)] == [not d["images"] for d in docs]


def test_likelihoods_come_back_as_they_were(make, open_cache):
    docs, model = documents(4), make(QVLMSimple, batch_size=2)
    expected = score(model, docs, ["a", "b", "c", "d"])
    requests = [
        instance("loglikelihood", (d["text"], c, lambda doc: doc["images"], i, "toy", "test"), i)
        for i, (d, c) in enumerate(zip(docs, "abcd", strict=True))
    ]
    cache = open_cache()
    for _ in range(2):
        assert cache.execute(model, "loglikelihood", requests) == expected
    assert model.record.counts.found == {} and len(model.record.counts.images) == 4


def test_sampled_answers_are_those_of_a_run_without_the_cache(make, open_cache):
    docs, model = documents(5), make(batch_size=2)
    expected = texts(model.generate_until(ask(model, docs, temperature=1.5)))
    assert run(open_cache(), make(batch_size=2), docs, temperature=1.5) == expected


@pytest.mark.parametrize("changed", ["generation_config.json", "chat_template.jinja", "processor_config.json", "plan"])
def test_answers_of_another_model_are_not_served(make, open_cache, tiny_llava, tmp_path, changed):
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    docs = documents(2)
    run(open_cache(), make(pretrained=str(folder)), docs)
    more = {"method": "rtn", "scheme": "w4a16", "group_size": 16} if changed == "plan" else {}
    if changed.endswith(".json"):
        settings = json.loads((folder / changed).read_text())
        pixels = settings.get("image_processor", {}) | {"image_mean": [0.1, 0.2, 0.3]}
        edited = (
            settings | {"repetition_penalty": 1.5} if changed.startswith("generation") else {"image_processor": pixels}
        )
        (folder / changed).write_text(json.dumps(settings | edited))
    elif not more:
        (folder / changed).write_text((folder / changed).read_text().replace("ASSISTANT", "MODEL"))
    model = make(pretrained=str(folder), **more)
    run(open_cache(), model, docs)
    assert model.record.counts.found == {} and model.record.counts.generated == {"toy": 2}


def test_other_packages_models_are_left_alone(open_cache):
    asked = []
    model = SimpleNamespace(generate_until=lambda requests: asked.append(len(requests)) or ["red"] * len(requests))
    requests = [
        Instance(
            "generate_until", ("question", {"until": []}, None, index, "t", "test"), 0,
            metadata={"task": "t", "doc_id": index, "repeats": 1},
        )
        for index in range(3)
    ]  # fmt: skip
    cache = open_cache()
    for _ in range(2):
        assert cache.execute(model, "generate_until", requests) == ["red"] * 3
    assert asked == [3]


def test_the_same_picture_as_a_file_is_the_same(make, open_cache, tmp_path):
    random_image(10).save(tmp_path / "a.png")
    docs = [{"text": "what?", "images": [random_image(10)]}, {"text": "who?", "images": [str(tmp_path / "a.png")]}]
    model = make()
    run(open_cache(), model, docs)
    assert len(set(model.record.counts.images.values())) == 1
