"""Tiny local mirrors of the standard tasks' data sets, in those sets' schemas, with random images."""

import json
import os
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from tiny_llava import random_image

SCIENCEQA = Features(
    {
        "image": Image(),
        "question": Value("string"),
        "choices": List(Value("string")),
        "answer": Value("int8"),
        "hint": Value("string"),
        "task": Value("string"),
        "grade": Value("string"),
        "subject": Value("string"),
        "topic": Value("string"),
        "category": Value("string"),
        "skill": Value("string"),
        "lecture": Value("string"),
        "solution": Value("string"),
    }
)
VIZWIZ = Features(
    {
        "question_id": Value("string"),
        "image": Image(),
        "question": Value("string"),
        "answers": List(Value("string")),
        "category": Value("string"),
    }
)
VQAV2 = Features(
    {
        "question_type": Value("string"),
        "multiple_choice_answer": Value("string"),
        "answers": List({"answer": Value("string"), "answer_confidence": Value("string"), "answer_id": Value("int64")}),
        "image_id": Value("int64"),
        "answer_type": Value("string"),
        "question_id": Value("int64"),
        "question": Value("string"),
        "image": Image(),
    }
)


def scienceqa_row(index: int) -> dict:
    """Every third document has no image; every second has a hint."""
    return {
        "image": random_image(index, 40) if index % 3 else None,
        "question": f"Which object is shown as number {index}?",
        "choices": ["a key", "a bottle", "a lamp"][: 2 + index % 2],
        "answer": index % 2,
        "hint": "It is large." if index % 2 else "",
        "grade": f"grade{1 + index}",
        "subject": ("natural science", "social science", "language science")[index // 2 % 3],
        **dict.fromkeys(("task", "topic", "category", "skill", "lecture", "solution"), "x"),
    }


def vizwiz_row(index: int) -> dict:
    return {
        "question_id": f"VizWiz_val_{index:08}",
        "image": random_image(1000 + index, 36),
        "question": f"what is number {index}?",
        "answers": ["a cup"] * 6 + ["mug"] * 4,
        "category": ("other", "unanswerable", "yes/no", "number")[index % 4],
    }


def vqav2_row(index: int) -> dict:
    answers = ["red"] * 7 + ["blue"] * 3
    return {
        "question_type": "what",
        "multiple_choice_answer": "red",
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(answers)],
        "image_id": index,
        "answer_type": ("other", "yes/no", "number")[index % 3],
        "question_id": index,
        "question": f"What colour is number {index}?",
        "image": random_image(2000 + index, 44),
    }


SETS = {
    "ScienceQA": (scienceqa_row, SCIENCEQA, {"train": range(100, 200), "test": range(9)}, "ScienceQA-FULL"),
    "VizWiz-VQA": (vizwiz_row, VIZWIZ, {"val": range(5), "test": range(5, 8)}, "default"),
    "VQAv2": (vqav2_row, VQAV2, {"train": range(50, 56), "validation": range(6), "test": range(6, 10)}, "default"),
}
SECRET = {"VizWiz-VQA": ("answers", "category"), "VQAv2": ("answers", "answer_type", "multiple_choice_answer")}
"""Columns that the test splits do not tell."""


def write_mirrors(directory: Path, stand_in: bool = True) -> Path:
    """Write ``directory/lmms-lab-encoder/…``; the harness finds them when it runs in ``directory``."""
    for name, (row, features, splits, config) in SETS.items():
        folder = directory / "lmms-lab-encoder" / name
        folder.mkdir(parents=True)
        files = []
        for split, indices in splits.items():
            secret = dict.fromkeys(SECRET.get(name, ()) if split == "test" else ())
            rows = [row(index) | secret for index in indices]
            if name == "VizWiz-VQA":
                rows = [one | {"question_id": one["question_id"].replace("val", split)} for one in rows]
            data = Dataset.from_list(rows, features=features)
            path = f"{config}/{split}-00000-of-00001.parquet"
            (folder / config).mkdir(exist_ok=True)
            data.to_parquet(folder / path)
            files.append(f"  - split: {split}\n    path: {path}")
        header = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n" + "\n".join(files) + "\n---\n"
        (folder / "README.md").write_text(header)
        if stand_in:
            (folder / "stand_in.json").write_text(json.dumps({"made_by": "tests"}))
    return directory


def write_conversations(file: Path, indices: range, images: Path) -> None:
    """Write documents of VQAv2 as a calibration file of LLaVA's format, and their images to a folder."""
    rows = []
    for row in map(vqav2_row, indices):
        row["image"].save(images / f"{row['image_id']}.png")
        question = f"<image>\n{row['question']}\nAnswer the question using a single word or phrase."
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
        rows.append({"image": f"{row['image_id']}.png", "conversations": turns})
    file.write_text(json.dumps(rows))


def environment_in(place: Path) -> dict[str, str]:
    """For a command that runs there, with caches of its own."""
    return os.environ | {
        "HF_DATASETS_CACHE": str(place / "datasets-cache"),
        "QVLM_CACHE": str(place / "qvlm-cache"),
    }
