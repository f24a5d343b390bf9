"""Tiny local mirrors of eight more data sets of the harness, in their schemas, and a model that answers in words."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, List, Value
from tiny_llava import random_image, write_tiny_llava

from qvlm_plugin.conversation import Conversation, encode
from qvlm_plugin.models.loading import LoadedModel, load

TEXT, NUMBER, WHOLE = Value("string"), Value("int32"), Value("int64")
WORDS = ("yes", "no", "red", "7")
"""What the questions that are not answered by a letter are answered by."""

TEXTVQA = {
    "image_id": TEXT, "question_id": NUMBER, "question": TEXT, "question_tokens": List(TEXT), "image": Image(),
    "image_width": NUMBER, "image_height": NUMBER, "flickr_original_url": TEXT, "flickr_300k_url": TEXT,
    "answers": List(TEXT), "image_classes": List(TEXT), "set_name": TEXT, "ocr_tokens": List(TEXT),
}  # fmt: skip
GQA_QUESTIONS = {
    "id": TEXT, "imageId": TEXT, "question": TEXT, "answer": TEXT, "fullAnswer": TEXT, "isBalanced": Value("bool"),
    "groups": {"global": TEXT, "local": TEXT}, "types": {"detailed": TEXT, "semantic": TEXT, "structural": TEXT},
}  # fmt: skip
GQA_IMAGES = {"id": TEXT, "image": Image()}
POPE = {
    "id": TEXT, "question_id": TEXT, "question": TEXT, "answer": TEXT, "image_source": TEXT, "image": Image(),
    "category": TEXT,
}  # fmt: skip
MME = {"question_id": TEXT, "image": Image(), "question": TEXT, "answer": TEXT, "category": TEXT}
MMMU = {
    "id": TEXT, "question": TEXT, "options": TEXT, "explanation": TEXT,
    **{f"image_{index}": Image() for index in range(1, 8)}, "img_type": TEXT, "answer": TEXT, "topic_difficulty": TEXT,
    "question_type": TEXT, "subfield": TEXT,
}  # fmt: skip
CHARTQA = {"type": TEXT, "question": TEXT, "answer": TEXT, "image": Image()}
AI2D = {"question": TEXT, "options": List(TEXT), "answer": TEXT, "image": Image()}
SEED = {
    "answer": TEXT, **{f"choice_{letter}": TEXT for letter in "abcd"}, "data_id": TEXT, "data_type": TEXT,
    "question": TEXT, "question_id": TEXT, "question_type_id": Value("int16"), "image": List(Image()),
    "segment": List(WHOLE),
}  # fmt: skip


def textvqa_row(index: int) -> dict:
    """Four of ten people say one of the model's words: at most 1 of 1, at least 0.3 where fewer do."""
    answers = [WORDS[index % 4]] * 2 + [WORDS[(index + 1) % 4]] * 4 + ["key"] * 4
    blank = {name: [] for name in ("question_tokens", "image_classes", "ocr_tokens")}
    blank |= dict.fromkeys(("image_id", "flickr_original_url", "flickr_300k_url"), "x")
    size = {"image_width": 30, "image_height": 30, "set_name": "val"}
    asked = {"question_id": index, "question": f"what does sign {index} say?", "answers": answers}
    return {**blank, **size, **asked, "image": random_image(index, 30)}


def gqa_row(index: int) -> dict:
    names = dict.fromkeys(("detailed", "semantic", "structural"), "x")
    asked = {"id": str(index), "imageId": f"n{index // 2}", "question": f"Is number {index} red?"}
    return asked | {
        "answer": WORDS[index % 2], "fullAnswer": "x", "isBalanced": True, "groups": {"global": "x", "local": "x"},
        "types": names,
    }  # fmt: skip


def gqa_image(index: int) -> dict:
    return {"id": f"n{index}", "image": random_image(100 + index, 40)}


def pope_row(index: int) -> dict:
    """Two questions about each image, the answers yes and no by turns of three."""
    asked = {"id": str(index), "question_id": str(index), "question": f"Is there a key, number {index}?"}
    image = {"image_source": "x", "image": random_image(200 + index // 2, 32), "category": "random"}
    return asked | image | {"answer": "yes" if index % 3 else "no"}


def mme_row(index: int) -> dict:
    """As there: two questions about each image, one to be affirmed and one to be denied."""
    category = ("existence", "OCR", "code_reasoning")[index // 2 % 3]
    question = f"Is this number {index}? Please answer yes or no."
    image = {"question_id": f"{category}/{index // 2}.png", "image": random_image(300 + index // 2, 36)}
    return image | {"question": question, "answer": "No" if index % 2 else "Yes", "category": category}


def mmmu_row(index: int) -> dict:
    """With one, two or three images, placed within the text; every fourth question is an open one."""
    count, subject = 1 + index % 3, ("Art", "Physics")[index % 2]
    images = {f"image_{k}": random_image(400 + 10 * index + k, 32) if k <= count else None for k in range(1, 8)}
    shown = " and ".join(f"<image {k}>" for k in range(1, count + 1))
    blank = dict.fromkeys(("explanation", "img_type", "topic_difficulty", "subfield"), "x")
    row = {"id": f"validation_{subject}_{index}", "question": f"What is number {index} in {shown}?", **images, **blank}
    if index % 4 == 3:
        return row | {"options": "[]", "answer": "7", "question_type": "open"}
    return row | {"options": "['a key', 'a lamp']", "answer": "AB"[index % 2], "question_type": "multiple-choice"}


def chartqa_row(index: int) -> dict:
    """Numbers may be off by a twentieth: 7 is right where 7.2 is asked for."""
    answer, kind = ("7.2", "red", "9")[index % 3], ("human_test", "augmented_test")[index % 2]
    return {"type": kind, "question": f"How high is {index}?", "answer": answer, "image": random_image(500 + index, 48)}


def ai2d_row(index: int) -> dict:
    options = ["a leaf", "a root", "a stem", "a seed"]
    image = random_image(600 + index, 40)
    return {"question": f"What is {index}?", "options": options, "answer": str(index % 2), "image": image}


def seed_row(index: int) -> dict:
    """Of one image, or of a video: eight frames."""
    video = index % 3 == 2
    frames = [random_image(700 + 10 * index + k, 30) for k in range(8 if video else 1)]
    choices = {"choice_a": "a key", "choice_b": "red", "choice_c": "a lamp", "choice_d": "none"}
    asked = {"answer": "AB"[index % 2], "question": f"What is {index}?", "question_id": str(index)}
    kind = {"data_id": str(index), "data_type": "video" if video else "image", "question_type_id": 1, "segment": []}
    return choices | asked | kind | {"image": frames}


SETS = {
    "textvqa": {"default": ("validation", textvqa_row, TEXTVQA, 8)},
    "GQA": {
        "testdev_balanced_instructions": ("testdev", gqa_row, GQA_QUESTIONS, 8),
        "testdev_balanced_images": ("testdev", gqa_image, GQA_IMAGES, 4),
    },
    "POPE": {"default": ("test", pope_row, POPE, 12)},
    "MME": {"default": ("test", mme_row, MME, 12)},
    "MMMU": {"default": ("validation", mmmu_row, MMMU, 12)},
    "ChartQA": {"default": ("test", chartqa_row, CHARTQA, 12)},
    "ai2d": {"default": ("test", ai2d_row, AI2D, 8)},
    "SEED-Bench": {"default": ("test", seed_row, SEED, 9)},
}
"""By data set and configuration: the split that is evaluated, its rows and their schema, and how many there are."""


def write_task_mirrors(directory: Path) -> Path:
    """Write ``directory/lmms-lab-encoder/…``; the harness finds them when it runs in ``directory``."""
    for name, configs in SETS.items():
        folder, listed = directory / "lmms-lab-encoder" / name, []
        for config, (split, row, schema, count) in configs.items():
            path = f"{config}/{split}-00000-of-00001.parquet"
            (folder / config).mkdir(parents=True)
            Dataset.from_list([*map(row, range(count))], features=Features(schema)).to_parquet(folder / path)
            listed.append(f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {path}\n")
        (folder / "README.md").write_text("---\nconfigs:\n" + "".join(listed) + "---\n")
        (folder / "stand_in.json").write_text(json.dumps({"made_by": "tests"}))
    return directory


def write_answering_llava(directory: Path, *pairs: tuple[str, str]) -> Path:
    """A tiny random LLaVA whose next token is always one of the words of ``pairs``, whichever its last state says.

    Longer words take the places of control characters in its vocabulary. Rows of the output layer are 0 but for the
    opposite ones of a pair, so that one word has a logit above 0. They are orthogonal to what the last states have in
    common of a data set's prompts, so that answers differ.
    """
    write_tiny_llava(directory)
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    longer = [word for pair in pairs for word in pair if word not in vocabulary]
    for word, token in zip(longer, sorted(vocabulary, key=vocabulary.get)[-len(longer) :], strict=True):
        vocabulary[word] = vocabulary.pop(token)
    file.write_text(json.dumps(content))
    loaded = load(str(directory), dtype="float32")
    common = torch.stack([_last_states(loaded, row, end).mean(dim=0) for row, end in PROMPTS])
    rows = torch.randn(len(pairs), common.shape[1], generator=torch.Generator().manual_seed(0))
    rows -= rows @ torch.linalg.pinv(common) @ common
    weight = loaded.model.lm_head.weight.data.zero_()
    for (one, other), row in zip(pairs, rows, strict=True):
        weight[vocabulary[one]], weight[vocabulary[other]] = row, -row
    loaded.model.save_pretrained(directory)
    return directory


WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
PROMPTS = [
    *((row, WORD) for row in (textvqa_row, pope_row, mme_row)),
    (chartqa_row, "Answer the question with a single word."),
    *((row, LETTER) for row in (ai2d_row, seed_row)),
]
"""Whose questions end how."""


@torch.inference_mode()
def _last_states(loaded: LoadedModel, row: Callable[[int], dict], end: str) -> torch.Tensor:
    """Of a data set's questions, the options left out, float32[12, hidden]."""
    rows = [row(index) for index in range(12)]
    prompts = [
        Conversation.from_prompt(
            f"{one['question'].replace(' Please answer yes or no.', '')}\n{end}",
            one["image"] if isinstance(one["image"], list) else [one["image"]],
        )
        for one in rows
    ]
    inputs, _ = encode(loaded.processor, prompts)
    return loaded.model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]
