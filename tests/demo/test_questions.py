import random

import pytest

from qvlm_plugin.demo.questions import (
    COLORS,
    SCIENCEQA,
    VIZWIZ,
    VQAV2,
    Picture,
    Pool,
    example,
    held_out,
    official,
    png,
    scienceqa,
    text_only_document,
    vizwiz,
    vqav2,
)


@pytest.fixture(scope="module")
def questions():
    return official("test")


def test_official_split_is_complete(questions):
    train = official("train")
    assert (len(train), len({q.picture for q in train})) == (38575, 4000)
    assert (len(questions), len({q.picture for q in questions})) == (9673, 1000)
    assert len(held_out()) == 400


def test_facts_agree_with_every_official_answer(questions):
    checked = 0
    for question in questions:
        if question.fact is None:
            continue
        color, shape = question.fact.split()
        words = question.text.rstrip("?").split()
        if question.open:
            assert question.answer == (color if "color" in words else shape)
        else:
            shown = bool({color, shape} & set(words))
            denied = bool({"not", "no"} & set(words))
            assert question.answer == ("yes" if shown != denied else "no")
        checked += 1
    assert checked > 7000


def test_prompts_and_answers_are_the_harness_s_own(questions):
    from lmms_eval.tasks.scienceqa import utils as scienceqa_task
    from lmms_eval.tasks.vizwiz_vqa import utils as vizwiz_task
    from lmms_eval.tasks.vqav2 import utils as vqav2_task

    post = "\nAnswer the question using a single word or phrase."
    insufficient = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    letter = "\nAnswer with the option's letter from the given choices directly."
    rng = random.Random(0)
    for index, question in enumerate(rng.sample([q for q in questions if q.fact], 40)):
        doc = vqav2(question, index)
        asked = example(VQAV2, doc)
        assert asked.prompt == vqav2_task.vqav2_doc_to_text(doc, {"pre_prompt": "", "post_prompt": post})
        assert vqav2_task.vqav2_process_results(doc, [asked.answer])["exact_match"] == 1
        assert vqav2_task.vqav2_process_results(doc, ["purple"])["exact_match"] == 0

        doc = vizwiz(question, index, Picture("empty", index) if index % 2 else None)
        asked = example(VIZWIZ, doc)
        kwargs = {"pre_prompt": "", "post_prompt": insufficient + post}
        assert asked.prompt == vizwiz_task.vizwiz_vqa_doc_to_text(doc, kwargs)
        assert vizwiz_task.vizwiz_vqa_process_results(doc, [asked.answer])["exact_match"] == 1

        doc = scienceqa(question, rng, text_only=bool(index % 2))
        asked = example(SCIENCEQA, doc)
        kwargs = {"format": "default", "pre_prompt": "", "post_prompt": letter}
        assert asked.prompt == scienceqa_task.sqa_doc_to_text(doc, kwargs)
        assert scienceqa_task.sqa_process_results(doc, [asked.answer])["exact_match"] == 1
        assert scienceqa_task.sqa_process_results(doc, [doc["choices"][doc["answer"]]])["exact_match"] == 0


def test_choices_contain_the_answer_once_at_every_position(questions):
    rng = random.Random(1)
    places = []
    for question in (q for q in questions if q.answer in COLORS):
        doc = scienceqa(question, rng)
        assert doc["choices"][doc["answer"]] == question.answer
        assert len(set(doc["choices"])) == len(doc["choices"]) >= 3
        places.append(doc["answer"])
    assert set(places) == {0, 1, 2, 3}


def test_text_only_documents_state_the_fact_and_keep_their_split(questions):
    pool, rng = Pool.of(q for q in questions if q.fact), random.Random(2)
    prompts = {split: set() for split in ("train", "validation", "test")}
    for split, seen in prompts.items():
        for _ in range(300):
            doc = text_only_document(pool, rng, 0.6, split)
            assert doc["image"] is None
            assert any(color in f"{doc['hint']} {doc['question']}" for color in COLORS)
            seen.add(SCIENCEQA.prompt(doc))
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]


def test_pool_draws_open_questions_as_often_as_asked(questions):
    pool, rng = Pool.of(questions), random.Random(3)
    drawn = [pool.draw(rng, 0.7).open for _ in range(2000)]
    assert sum(drawn) / len(drawn) == pytest.approx(0.7, abs=0.05)
    only_closed = Pool.of(q for q in questions if not q.open)
    assert not only_closed.draw(rng, 1.0).open


def test_empty_pictures_differ_and_repeat():
    pictures = [png(Picture("empty", number)) for number in range(60)]
    assert len(set(pictures)) == 60
    assert png(Picture("empty", 7)) == pictures[7]
