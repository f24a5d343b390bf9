"""``--model qvlm`` at full precision: the answers of transformers alone, whatever the batch and the request format."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from family_list import HUGGING_FACE
from harness.test_wrapper import ask, instance, score, texts, to_messages, unprintable
from lmms_eval.models import get_model
from lmms_eval.models.chat.huggingface import Huggingface
from tiny_llava import random_image
from torch._dynamo.utils import counters
from transformers import AutoModelForImageTextToText, AutoProcessor, CompileConfig

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.wrapper import QVLMChat, QVLMSimple

SHAPES = [(50, 30), (30, 60), (40, 40), (28, 90)]
DOCUMENTS = [
    {
        "text": f"{'why ' * (index % 3)}what is number {index}?",
        "images": [
            random_image(10 * index + k, 32).resize(SHAPES[(index + k) % 4]) for k in range((1, 0, 2, 1)[index % 4])
        ],
    }
    for index in range(8)
]


@pytest.fixture(scope="module", params=HUGGING_FACE)
def folder(request, tmp_path_factory):
    return str(HUGGING_FACE[request.param](tmp_path_factory.mktemp("family") / "model"))


@pytest.fixture(scope="module")
def model(folder):
    return QVLMChat(pretrained=folder, dtype="float32", device="cpu", batch_size=8)


def plainly(model, doc):
    """Ids of the prompt and text of the answer, by transformers alone."""
    processor = AutoProcessor.from_pretrained(model.record.facts["pretrained"])
    processor.image_processor = model._processor.image_processor
    text, images = doc["text"], doc["images"]
    if isinstance(processor, transformers.PaliGemmaProcessor):  # has no chat template
        inputs = processor(text="<image>" * len(images) + text, images=[images], return_tensors="pt")
        del inputs["labels"]
    else:
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **how)
    bare = AutoModelForImageTextToText.from_pretrained(model.record.facts["pretrained"], dtype=torch.float32)
    output = bare.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=unprintable(model))
    ids, answer = inputs["input_ids"][0], output[0, inputs["input_ids"].shape[1] :]
    return ids, processor.tokenizer.decode(answer, skip_special_tokens=True)


def test_compiled_decoding_gives_the_same_answers(model, folder, monkeypatch):
    how = partial(CompileConfig, backend="eager")  # test_wrapper.py has the default compiler, which takes longer
    monkeypatch.setattr("qvlm_plugin.models.decoding.CompileConfig", how)
    given = {"pretrained": folder, "dtype": "float32", "device": "cpu", "batch_size": 3, "compile": True}
    if model._model.config.model_type in ("idefics3", "smolvlm", "paligemma"):
        with pytest.raises(QVLMError, match="transformers does not compile"):
            QVLMChat(**given)
        return
    torch.compiler.reset()
    counters.clear()
    compiled = QVLMChat(**given)
    # Documents of one image each, in a batch of three. For one model type another batch of one is compiled, too.
    docs = [DOCUMENTS[index] for index in ((0, 3, 4, 7) if model._model.config.model_type == "llava" else (0, 3, 4))]
    expected, found = (texts(one.generate_until(ask(one, docs, max_new_tokens=4))) for one in (model, compiled))
    assert found == expected
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]


def test_the_harness_knows_it_in_both_formats():
    for name in ("qvlm", "qvlm_llava"):
        assert get_model(name) is QVLMChat
        assert get_model(name, force_simple=True) is QVLMSimple


@pytest.fixture
def prompts(model, monkeypatch):
    """The ids of each prompt that the model is given, one document at a time."""
    seen, generate = [], model._model.generate

    def spy(**arguments):
        seen.append(arguments["input_ids"][0])
        return generate(**arguments)

    monkeypatch.setattr(model._model, "generate", spy)
    monkeypatch.setattr(model, "_batch_size", 1)
    return seen


def test_prompts_and_answers_equal_those_of_plain_transformers(model, prompts):
    for index in (0, 1, 2):
        if not DOCUMENTS[index]["images"] and model._model.config.model_type == "paligemma":
            continue  # its own processor takes no prompt without an image
        found = texts(model.generate_until(ask(model, DOCUMENTS, [index], max_new_tokens=6)))
        ids, expected = plainly(model, DOCUMENTS[index])
        assert torch.equal(prompts[-1], ids)
        assert found == [expected]


class HarnessWrapper(Huggingface):
    """The harness's own wrapper, without a model: it notes the ids of its prompts.

    transformers refuses ``videos`` and ``audios`` today, which the wrapper names even where there are none.
    """

    def __init__(self, folder):
        super(Huggingface, self).__init__()
        processor = AutoProcessor.from_pretrained(folder)
        self.task_dict, self.seen, self.use_cache, self.system_prompt = {}, [], True, None
        self.batch_size_per_gpu, self._rank, self.device_map, self._device = 1, 0, "cpu", "cpu"
        self._tokenizer = processor.tokenizer
        self.processor = _WithoutEmptyArguments(processor)
        self._model = SimpleNamespace(generate=self.note)

    def note(self, input_ids, **_):
        self.seen.append(input_ids[0])
        return input_ids


class _WithoutEmptyArguments:
    def __init__(self, processor):
        self.processor = processor
        self.apply_chat_template, self.batch_decode = processor.apply_chat_template, processor.batch_decode

    def __call__(self, **given):
        return self.processor(**{name: value for name, value in given.items() if value != []})


def test_prompts_equal_those_of_the_harness_own_wrapper(model, folder, prompts):
    if model._model.config.model_type == "paligemma":
        pytest.skip("the harness's wrapper needs a chat template, which PaliGemma's checkpoints lack")
    theirs = HarnessWrapper(folder)
    theirs.task_dict["toy"] = {"test": DOCUMENTS}
    for index, document in enumerate(DOCUMENTS[:3]):
        if model._model.config.model_type == "llava_onevision" and len(document["images"]) > 1:
            continue  # the harness's wrapper hands them over as images of several prompts, which are cropped
        model.generate_until(ask(model, DOCUMENTS, [index], max_new_tokens=1))
        arguments = (document["text"], to_messages, {"max_new_tokens": 1}, index, "toy", "test")
        theirs.generate_until([instance("generate_until", arguments, index)])
        assert torch.equal(prompts[-1], theirs.seen[-1])


def test_simple_requests_are_answered_as_chat_requests(model, folder):
    simple = QVLMSimple(pretrained=folder, dtype="float32", device="cpu", batch_size=8)
    expected = texts(model.generate_until(ask(model, DOCUMENTS, max_new_tokens=6)))
    assert texts(simple.generate_until(ask(simple, DOCUMENTS, max_new_tokens=6))) == expected


def test_batches_of_any_size_answer_alike(model, monkeypatch):
    answers = []
    for size in (1, 3, 8):
        monkeypatch.setattr(model, "_batch_size", size)
        answers.append(texts(model.generate_until(ask(model, DOCUMENTS, max_new_tokens=6))))
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 1


def test_batches_of_any_size_score_alike(model, monkeypatch):
    continuations, scores = ["red", "a big key", "no"] * 3, []
    for size in (1, 8):
        monkeypatch.setattr(model, "_batch_size", size)
        scores.append([value for value, _ in score(model, DOCUMENTS, continuations[:8])])
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_videos_are_refused(model):
    model.task_dict["toy"] = {"test": [{}]}
    messages = [{"role": "user", "content": [{"type": "video", "url": "clip.mp4"}]}]
    request = instance("generate_until", ("what?", lambda doc: messages, {}, 0, "toy", "test"), 0)
    with pytest.raises(QVLMError, match=r"document 0 of task toy .* contains video; this model reads only"):
        model.generate_until([request])
