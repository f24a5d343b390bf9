"""Stand-in data: local mirrors of the three hub data sets, with the same schemas, made from easy-VQA.

When lmms-eval runs in the folder of the mirrors, its own tasks load them instead of the hub's data sets, offline.
Evaluated splits have only easy-VQA's test images, the others only its train images, and every mirror is marked as
stand-in data.
"""

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from filelock import FileLock

from qvlm_plugin.atomic import follow_umask
from qvlm_plugin.demo import parts
from qvlm_plugin.demo.questions import (
    SCIENCEQA,
    UNANSWERABLE,
    VIZWIZ,
    VQAV2,
    Benchmark,
    Document,
    Picture,
    Pool,
    Question,
    example,
    held_out,
    official,
    png,
    scienceqa,
    text_only_document,
    vizwiz,
    vqav2,
)
from qvlm_plugin.errors import QVLMError

MARKER = "stand_in.json"
MADE_FROM = f"easy-VQA {parts.QUESTIONS.version}"
OPEN_SHARE = 0.6  # of the questions, so that neither "yes" nor "no" is a good guess
EMPTY_SHARE = 0.22  # of the VizWiz documents, about as in VizWiz
FIRST_EMPTY = {"val": 10_000, "test": 20_000}  # training uses empty pictures of smaller numbers

TEXT, WORDS = Value("string"), List(Value("string"))
SCIENCEQA_FEATURES = Features(
    {"image": Image(), "question": TEXT, "choices": WORDS, "answer": Value("int8"), "hint": TEXT, "task": TEXT}
    | dict.fromkeys(("grade", "subject", "topic", "category", "skill", "lecture", "solution"), TEXT)
)
VIZWIZ_FEATURES = Features(
    {"question_id": TEXT, "image": Image(), "question": TEXT, "answers": WORDS, "category": TEXT}
)
VQAV2_FEATURES = Features(
    {
        "question_type": TEXT,
        "multiple_choice_answer": TEXT,
        "answers": List({"answer": TEXT, "answer_confidence": TEXT, "answer_id": Value("int64")}),
        "image_id": Value("int64"),
        "answer_type": TEXT,
        "question_id": Value("int64"),
        "question": TEXT,
        "image": Image(),
    }
)


@dataclass(frozen=True)
class Mirror:
    """A data set to write: `splits` maps (configuration, split) to documents; the hub id becomes the folder's path."""

    hub_id: str
    features: Features
    splits: Mapping[tuple[str, str], Sequence[Document]]


def write_mirrors(directory: Path) -> Path:
    """Write `lmms-lab-encoder/{ScienceQA,VizWiz-VQA,VQAv2}` and `calibration/` under `directory`, and return it.

    The documents are the same every time. A folder that has them already is left unchanged; one with other stand-in
    data is replaced. `calibration/train.json` with `calibration/images/` is in LLaVA's conversation format: train
    images, with the prompts of all three benchmarks as the harness formats them.

    Raises:
        QVLMError: easy-VQA cannot be fetched, or a folder exists that is not marked as a stand-in.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / ".stand_in.lock"):
        for mirror in mirrors():
            documents = [doc for docs in mirror.splits.values() for doc in docs]
            _put(directory / mirror.hub_id, documents, partial(_write_mirror, mirror))
        samples = calibration_samples()
        _put(directory / "calibration", [doc for _, doc in samples], partial(_write_calibration, samples))
    return directory


# Contents of the data sets --------------------------------------------------------------------------------------------


def mirrors() -> list[Mirror]:
    """The three data sets: 2,000 to 2,500 documents in each evaluated split, fewer in the others."""
    train, test = official("train"), official("test")
    return [
        _scienceqa(
            train=[q for q in train if q.picture.number not in held_out()],
            validation=[q for q in train if q.picture.number in held_out()],
            test=test,
        ),
        _vizwiz(test),
        _vqav2(test),
    ]


def _scienceqa(**pools: Sequence[Question]) -> Mirror:
    """ScienceQA's mirror; as in ScienceQA, the -IMG configuration is the part of -FULL that has images."""
    counts = {"train": (600, 400), "validation": (300, 200), "test": (1500, 1000)}  # with image, text-only
    splits: dict[tuple[str, str], Sequence[Document]] = {}
    for split, pool in pools.items():
        rng = random.Random(f"scienceqa {split}")
        with_image, text_only = counts[split]
        shown = [scienceqa(question, rng) for question in _sample(pool, with_image, rng)]
        full = shown + _text_only_documents(pool, text_only, rng, split)
        rng.shuffle(full)
        splits["ScienceQA-FULL", split] = full
        splits["ScienceQA-IMG", split] = [doc for doc in full if doc["image"]]
    return Mirror("lmms-lab-encoder/ScienceQA", SCIENCEQA_FEATURES, splits)


def _vizwiz(pool: Sequence[Question]) -> Mirror:
    rng = random.Random("vizwiz")
    drawn = _sample(pool, 2500, rng)
    splits = {}
    for split, questions in {"val": drawn[:2000], "test": drawn[2000:]}.items():
        documents = []
        for index, question in enumerate(questions):
            number = index + FIRST_EMPTY[split]
            empty = Picture("empty", number) if rng.random() < EMPTY_SHARE else None
            documents.append(vizwiz(question, number, empty))
        splits["default", split] = documents
    splits["default", "test"] = [doc | {"answers": None, "category": None} for doc in splits["default", "test"]]
    return Mirror("lmms-lab-encoder/VizWiz-VQA", VIZWIZ_FEATURES, splits)


def _vqav2(pool: Sequence[Question]) -> Mirror:
    documents = [vqav2(question, index) for index, question in enumerate(_sample(pool, 3000, random.Random("vqav2")))]
    secret = dict.fromkeys(("question_type", "multiple_choice_answer", "answers", "answer_type"))
    splits = {
        ("default", "validation"): documents[:2000],
        ("default", "testdev"): [doc | secret for doc in documents[2000:2500]],
        ("default", "test"): [doc | secret for doc in documents[2500:]],
    }
    return Mirror("lmms-lab-encoder/VQAv2", VQAV2_FEATURES, splits)


def calibration_samples() -> list[tuple[Benchmark, Document]]:
    """480 documents about train images: 120 VQAv2, 120 VizWiz, 240 ScienceQA (80 of them text-only)."""
    rng = random.Random("calibration")
    pool = [q for q in official("train") if q.picture.number not in held_out()]
    samples = [(VQAV2, vqav2(question, 0)) for question in _sample(pool, 120, rng)]
    for index, question in enumerate(_sample(pool, 120, rng)):
        empty = Picture("empty", index) if rng.random() < EMPTY_SHARE else None
        samples.append((VIZWIZ, vizwiz(question, index, empty)))
    samples += [(SCIENCEQA, scienceqa(question, rng)) for question in _sample(pool, 160, rng)]
    samples += [(SCIENCEQA, doc) for doc in _text_only_documents(pool, 80, rng, "train")]
    rng.shuffle(samples)
    return samples


def _sample(pool: Sequence[Question], count: int, rng: random.Random) -> list[Question]:
    """Distinct questions, OPEN_SHARE of them open, in random order."""
    distinct = list(dict.fromkeys(pool))
    questions = rng.sample([q for q in distinct if q.open], round(count * OPEN_SHARE))
    questions += rng.sample([q for q in distinct if not q.open], count - len(questions))
    rng.shuffle(questions)
    return questions


def _text_only_documents(pool: Sequence[Question], count: int, rng: random.Random, split: str) -> list[Document]:
    """Distinct text-only documents of the split."""
    facts = Pool.of(question for question in pool if question.fact)
    documents: dict[str, Document] = {}
    while len(documents) < count:
        doc = text_only_document(facts, rng, OPEN_SHARE, split)
        documents.setdefault(SCIENCEQA.prompt(doc), doc)
    return list(documents.values())


# Writing --------------------------------------------------------------------------------------------------------------


def _put(target: Path, documents: Iterable[Document], write: Callable[[Path], None]) -> None:
    """Write the folder `target` with `write`, in one step, unless its marker shows that it has the documents."""
    sha = hashlib.sha256()
    for doc in documents:
        sha.update(json.dumps({**doc, "image": None}, sort_keys=True).encode())
        sha.update(png(doc["image"]) if doc["image"] else b"")
    marker = {"stand_in": True, "made_from": MADE_FROM, "sha256": sha.hexdigest(), "layout": 1}
    if target.exists():
        found = _marker(target)
        if found == marker:
            return
        if found is None and any(target.iterdir()):
            raise QVLMError(f"demo data: {target} contains other data than the demo's; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        write(fresh)
        (fresh / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
        follow_umask(fresh)
        if target.exists():
            target.rename(Path(scratch) / "replaced")
        fresh.rename(target)


def _marker(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None


def _write_mirror(mirror: Mirror, folder: Path) -> None:
    configs: dict[str, list[dict[str, str]]] = {}
    for (config, split), documents in mirror.splits.items():
        file = folder / ("data" if config == "default" else config) / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(exist_ok=True)
        rows = [doc | {"image": _cell(doc["image"])} for doc in documents]
        Dataset.from_list(rows, features=mirror.features).to_parquet(file)
        configs.setdefault(config, []).append({"split": split, "path": str(file.relative_to(folder))})
    header = json.dumps(
        {"license": "mit", "configs": [{"config_name": name, "data_files": files} for name, files in configs.items()]},
        indent=2,
    )
    (folder / "README.md").write_text(f"---\n{header}\n---\n\n{CARD.format(name=mirror.hub_id)}")


def _cell(picture: Picture | None) -> dict[str, Any] | None:
    return {"bytes": png(picture), "path": f"{picture.source}-{picture.number}.png"} if picture else None


def _write_calibration(samples: Sequence[tuple[Benchmark, Document]], folder: Path) -> None:
    images = folder / "images"
    images.mkdir()
    rows = []
    for index, (benchmark, doc) in enumerate(samples):
        rendered = example(benchmark, doc)
        row: dict[str, Any] = {"id": f"stand-in-{index:04d}"}
        if rendered.picture:
            name = f"{rendered.picture.source}-{rendered.picture.number}.png"
            (images / name).write_bytes(png(rendered.picture))
            row["image"] = f"images/{name}"
        row["conversations"] = [
            {"from": "human", "value": ("<image>\n" if rendered.picture else "") + rendered.prompt},
            {"from": "gpt", "value": rendered.answer},
        ]
        rows.append(row)
    (folder / "train.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "README.md").write_text(CARD.format(name="a calibration set in LLaVA's conversation format"))


CARD = f"""\
# STAND-IN DATA, not {{name}}

These documents only have the shape of {{name}}. They were made by `qvlm demo data` from the images and questions of
{MADE_FROM} (Victor Zhou, MIT licence, https://github.com/vzhou842/easy-VQA): 64-pixel pictures of one coloured shape.
Scores on them say nothing about scores on the data set whose name they have. They allow its evaluation task to run
offline and unmodified, and quantization methods to be compared on a small model that can answer.

- Evaluated splits (and the other splits without answers) use easy-VQA's test images only. `train`, `validation` of
  ScienceQA and `calibration/` use its train images only, and those of `validation` are in no other split.
- Text-only documents describe in words what a picture shows; no prompt of one split occurs in another.
- Empty pictures (plain or noise), whose answer is "{UNANSWERABLE}", are drawn by us, as are choices, hints and grades;
  ScienceQA's subjects, topics and skills follow the kind of question. All ten annotators agree.
- `{MARKER}` is for programs: `sha256` is over the documents, columns as JSON and images as PNG files, in order.
"""
