"""The demo model in the harness's wrapper says what it says in plain transformers, on documents of both kinds."""

import pytest
import torch
from datasets import load_dataset
from lmms_eval.api.instance import Instance
from lmms_eval.tasks.scienceqa.utils import sqa_doc_to_text, sqa_doc_to_visual
from lmms_eval.tasks.vqav2.utils import vqav2_doc_to_text, vqav2_doc_to_visual
from transformers import AutoModelForImageTextToText, AutoProcessor

from qvlm_plugin.harness.wrapper import QVLMSimple

LETTER = "\nAnswer with the option's letter from the given choices directly."
WORD = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def documents(demo_data):
    """Of each kind, the prompt's text and images: 6 of ScienceQA (some without an image), 6 of VQAv2."""
    hub = demo_data / "lmms-lab-encoder"
    science = load_dataset(str(hub / "ScienceQA"), "ScienceQA-FULL", split="test[:6]")
    vqa = load_dataset(str(hub / "VQAv2"), split="validation[:6]")
    kwargs = {"format": "default", "pre_prompt": "", "post_prompt": LETTER}
    return [
        *({"text": sqa_doc_to_text(doc, kwargs), "images": sqa_doc_to_visual(doc)} for doc in science),
        *({"text": vqav2_doc_to_text(doc, {"post_prompt": WORD}), "images": vqav2_doc_to_visual(doc)} for doc in vqa),
    ]


@torch.inference_mode()
def test_full_precision_equals_plain_transformers(demo_model, documents):
    model = AutoModelForImageTextToText.from_pretrained(demo_model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(demo_model, backend="pil")  # as the wrapper: pixels equal to the bit
    expected = []
    for document in documents:
        content = [{"type": "image", "image": image} for image in document["images"]]
        content.append({"type": "text", "text": document["text"]})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        expected.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    wrapper = QVLMSimple(pretrained=str(demo_model), dtype="float32", device="cpu", batch_size=4)
    wrapper.task_dict["demo"] = {"test": documents}
    requests = [
        Instance(
            "generate_until",
            (document["text"], {"max_new_tokens": 16}, lambda doc: doc["images"], index, "demo", "test"),
            idx=0,
            metadata={"task": "demo", "doc_id": index, "repeats": 1},
        )
        for index, document in enumerate(documents)
    ]
    assert [result.text for result in wrapper.generate_until(requests)] == expected
    assert len(set(expected)) > 5 and sum(not document["images"] for document in documents) > 1
