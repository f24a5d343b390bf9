from functools import partial

import pytest
from harness.mirrors import SETS, scienceqa_row, vqav2_row, write_mirrors

from qvlm_plugin.calibration import read_calibration
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.task_source import draw_samples

_, _, SPLITS, _ = SETS["ScienceQA"]
ROWS = [row for row in map(scienceqa_row, SPLITS["train"]) if row["image"]]
"""ScienceQA's training documents with an image."""


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory):
    return write_mirrors(tmp_path_factory.mktemp("mirrors"))


@pytest.fixture(autouse=True)
def in_the_mirrors(mirrors, monkeypatch):
    monkeypatch.chdir(mirrors)


def read(text, seed=0, **options):
    return read_calibration(text, None, seed, partial(draw_samples, **options))


def prompts(calibration):
    return [sample.conversation.messages[-1]["content"][-1]["text"] for sample in calibration.samples]


def test_scienceqa_is_rendered_as_the_harness_does():
    calibration = read("scienceqa:train:8", seed=1)
    assert len(calibration.samples) == 8 and calibration.seed == 1
    for sample, prompt in zip(calibration.samples, prompts(calibration), strict=True):
        (row,) = (row for row in ROWS if row["question"] in prompt)
        assert len(sample.conversation.images) == 1
        assert sample.conversation.images[0].tobytes() == row["image"].tobytes()
        assert sample.answer == "AB"[row["answer"]]
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABC", row["choices"], strict=False))
        context = f"Context: {row['hint']}\n" if row["hint"] else ""
        instruction = "Answer with the option's letter from the given choices directly."
        assert prompt == f"{context}{row['question']}\n{options}\n{instruction}"


def test_the_draw_depends_on_the_seed_only():
    first, again, other = (prompts(read("scienceqa:train:5", seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_both_formats_are_the_same_documents():
    chat = read("scienceqa:train:4+vqav2_val:train:2", chat=True)
    simple = read("scienceqa:train:4+vqav2_val:train:2", chat=False)
    assert chat.digests() == simple.digests() and len(set(chat.digests())) == 6


def test_the_commonest_answer_is_the_target():
    calibration = read("vqav2_val:train:3")
    assert {sample.answer for sample in calibration.samples} == {"red"}
    known = {
        Conversation.from_prompt(
            f"{row['question']}\nAnswer the question using a single word or phrase.", [row["image"]]
        ).digest()
        for row in map(vqav2_row, range(50, 56))
    }
    assert set(calibration.digests()) <= known
    vizwiz = read("vizwiz_vqa_val:val:2", allow_overlap=True)
    assert {sample.answer for sample in vizwiz.samples} == {"a cup"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scienceqa:test:4", "scienceqa:test: the split is the one that the task evaluates; allowed are train"),
        ("scienceqa:holdout:4", "scienceqa:holdout: the split does not exist; allowed are train"),
        ("vizwiz_vqa_val:val:1", "the split is the one that the task evaluates; allowed are test"),
        ("scienceqa:train:99", f"scienceqa:train:99: only {len(ROWS)} documents have an image"),
        ("sciencqa:train:9", r"calibration=sciencqa is neither a task of lmms-eval \(similar: .*scienceqa"),
        ("gqa:train:4", "calibration=gqa: cannot load its data"),
        ("missing.json:4", "there is no such file"),
    ],
)
def test_bad_sources(text, message, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)  # the harness retries failed downloads
    with pytest.raises(QVLMError, match=message) as caught:
        read(text)
    assert "\n" not in str(caught.value)
