import json
from dataclasses import replace

import pytest
import torch
from tiny_llava import random_image

from qvlm_plugin.calibration import (
    CalibrationSet,
    Sample,
    Source,
    draw,
    parse_sources,
    read_calibration,
    read_conversations,
)
from qvlm_plugin.conversation import Conversation, render
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.loading import load
from qvlm_plugin.models.prompts import PROMPT_FORMATS, chat_template


def row(index, **changes):
    turns = [{"from": "human", "value": f"<image>\nWhat is {index}?"}, {"from": "gpt", "value": f"answer {index}"}]
    return {"id": str(index), "image": f"{index}.png", "conversations": turns, **changes}


@pytest.fixture
def folder(tmp_path):
    for index in range(6):
        random_image(index).save(tmp_path / f"{index}.png")
    (tmp_path / "rows.json").write_text(json.dumps([*map(row, range(6)), {"id": "text", "conversations": []}]))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row(index)) for index in range(6)))
    return tmp_path


def test_sources_are_tasks_with_splits_and_files():
    assert parse_sources("scienceqa:train:32+mix.json:8+x.jsonl") == (
        Source("scienceqa", "train", 32),
        Source("mix.json", None, 8),
        Source("x.jsonl", None, 64),
    )


@pytest.mark.parametrize("text", ["", "scienceqa", "scienceqa:", "a:b:c", "a:train:0", "mix.json:train:3", "a:train+"])
def test_sources_that_do_not_parse_are_errors_with_an_example(text):
    with pytest.raises(QVLMError, match="scienceqa:train:64"):
        parse_sources(text)


@pytest.mark.parametrize(
    "question",
    [
        "What is it?",
        "<image>\nWhat is it?",
        "What is it?\n<image>",
        "What is <image> it?",
        "<image>\nWhat is it?<image>",
    ],
)
def test_one_image_is_in_front_wherever_the_row_has_it(folder, loaded, question):
    loaded.processor.chat_template = chat_template(PROMPT_FORMATS["llava_v1"])
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a"}]
    (folder / "one.json").write_text(json.dumps([row(0, conversations=turns)]))
    (sample,) = read_conversations(folder / "one.json", None, 1, 0)
    asked = Conversation.from_prompt("What is  it?" if "is <image>" in question else "What is it?", [random_image(0)])
    assert render(loaded.processor, sample.conversation) == render(loaded.processor, asked)
    assert "USER: <image>\nWhat is" in render(loaded.processor, asked)
    assert sample.conversation.digest() == asked.digest()  # or the overlap with evaluated documents would be missed


def test_several_images_stay_where_the_row_has_them(folder, loaded):
    loaded.processor.chat_template = chat_template(PROMPT_FORMATS["llava_v1"])
    turns = [{"from": "human", "value": "Is <image> or\n<image> it?"}, {"from": "gpt", "value": "a"}]
    (folder / "two.json").write_text(json.dumps([row(0, image=["0.png", "1.png"], conversations=turns)]))
    (sample,) = read_conversations(folder / "two.json", None, 1, 0)
    assert "USER: Is <image> or\n<image> it? ASSISTANT" in render(loaded.processor, sample.conversation)


def test_special_tokens_in_questions_and_answers_are_text(folder, loaded):
    turns = [{"from": "human", "value": "<image>\nIs <s> or </s> it?"}, {"from": "gpt", "value": "<image> and </s> it"}]
    (folder / "odd.json").write_text(json.dumps([row(0, conversations=turns)]))
    batch, mask = next(read_calibration(f"{folder / 'odd.json'}:1", None, 0, None).batches(loaded.processor, 1))
    ids = batch["input_ids"]
    assert (ids == 3).sum() == 4 and not (ids == 1).any() and (ids == 2).sum() == 1  # four patches, one end
    assert loaded.processor.tokenizer.decode(ids[mask]) == "<image> and </s> it</s>"


def test_both_file_formats_give_the_same_samples(folder):
    sets = [read_conversations(folder / name, None, 4, seed=1) for name in ("rows.json", "rows.jsonl")]
    assert [sample.answer for sample in sets[0]] == [sample.answer for sample in sets[1]]
    assert CalibrationSet(tuple(sets[0])).content_hash() == CalibrationSet(tuple(sets[1])).content_hash()
    first = sets[0][0]
    number = first.answer.removeprefix("answer ")
    expected = Conversation.from_prompt(f"What is {number}?", [random_image(int(number))])
    assert first.conversation.digest() == expected.digest()


def test_draws_are_reproducible_distinct_and_follow_the_seed():
    items = list(range(100))
    assert draw(items, 10, 0) == draw(items, 10, 0) == sorted(set(draw(items, 10, 0)))
    assert draw(items, 10, 0) != draw(items, 10, 1)
    assert draw(items, 100, 5) == items


def test_sources_are_joined_in_order(folder):
    def from_task(task, split, count, seed):
        return [Sample(Conversation.from_prompt(f"{task} {split} {seed}"), "t")] * count

    text = f"quiz:train:2+{folder / 'rows.json'}:3"
    calibration = read_calibration(text, None, 7, from_task)
    assert [sample.answer for sample in calibration.samples[:2]] == ["t", "t"] and len(calibration.samples) == 5
    assert (calibration.source, calibration.seed) == (text, 7)


def test_batches_hold_prompts_with_answers(folder, loaded):
    calibration = read_calibration(f"{folder / 'rows.json'}:5", None, 0, None)
    batches = list(calibration.batches(loaded.processor, 2))
    assert [len(mask) for _, mask in batches] == [2, 2, 1]
    text = loaded.processor.tokenizer.decode(batches[0][0]["input_ids"][0][batches[0][1][0]])
    assert text == calibration.samples[0].answer + "</s>"


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_an_encoded_set_gives_the_same_batches_however_many_it_keeps(calibration, loaded, monkeypatch, limit):
    batches = list(calibration.batches(loaded.processor, 2))
    sizes = [sum(tensor.nbytes for tensor in inputs.values()) + answer.nbytes for inputs, answer in batches]
    monkeypatch.setattr("qvlm_plugin.calibration.KEPT_BYTES", sum(sizes[:limit]))
    encoded = calibration.encoded(loaded.processor, 2)
    assert len(encoded.kept) == limit
    alone = [inputs["input_ids"].shape[1] for inputs, _ in calibration.batches(loaded.processor, 1)]
    assert encoded.lengths == tuple(alone) and encoded.content_hash() == calibration.content_hash()
    for size in (2, 3, 2):
        again, expected = encoded.batches(loaded.processor, size), calibration.batches(loaded.processor, size)
        for (inputs, answer), (other, mask) in zip(again, expected, strict=True):
            assert inputs.keys() == other.keys() and torch.equal(answer, mask)
            assert all(torch.equal(inputs[name], other[name]) for name in other)
            inputs.clear()  # a reader's own dictionary


def test_a_part_of_an_encoded_set_is_that_part(calibration, loaded):
    encoded = calibration.encoded(loaded.processor, 2)
    pictured = tuple(sample for sample in calibration.samples if sample.conversation.images)
    part, expected = replace(encoded, samples=pictured), replace(calibration, samples=pictured)
    assert len(part.lengths) == len(pictured) < len(encoded.lengths)
    for (inputs, answer), (other, mask) in zip(
        part.batches(loaded.processor, 2), expected.batches(loaded.processor, 2), strict=True
    ):
        assert torch.equal(inputs["input_ids"], other["input_ids"]) and torch.equal(answer, mask)


def test_another_processor_encodes_anew(calibration, loaded, tiny_llava):
    encoded, other = calibration.encoded(loaded.processor, 5), load(str(tiny_llava), dtype="float32").processor
    other.chat_template = chat_template(PROMPT_FORMATS["llava_v1"])
    (inputs, _), (expected, _) = next(encoded.batches(other, 5)), next(calibration.batches(other, 5))
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert not torch.equal(inputs["input_ids"], next(encoded.batches(loaded.processor, 5))[0]["input_ids"])


def test_empty_and_imageless_sets_are_errors():
    with pytest.raises(QVLMError, match="empty"):
        CalibrationSet(())
    with pytest.raises(QVLMError, match="no image"):
        CalibrationSet((Sample(Conversation.from_prompt("text"), "a"),))


def test_unusable_files_are_named(folder):
    with pytest.raises(QVLMError, match="no such file"):
        read_conversations(folder / "absent.json", None, 1, 0)
    with pytest.raises(QVLMError, match="has 6 rows with an image under the key 'image', but needs 7"):
        read_conversations(folder / "rows.json", None, 7, 0)
    (folder / "broken.json").write_text("[{")
    with pytest.raises(QVLMError, match="not readable JSON"):
        read_conversations(folder / "broken.json", None, 1, 0)
    (folder / "object.json").write_text("{}")
    with pytest.raises(QVLMError, match="list of objects"):
        read_conversations(folder / "object.json", None, 1, 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conversations": []}, "no question and answer"),
        ({"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}, "begin with human"),
        ({"image": "absent.png"}, "cannot be read"),
        ({"image": "rows.json"}, "cannot be read"),
        ({"image": ["0.png", "1.png"]}, "row '0' places 1 of its 2 images with <image>; place all, or none"),
    ],
)
def test_unusable_rows_are_named(folder, changes, message):
    (folder / "bad.json").write_text(json.dumps([row(0, **changes)]))
    with pytest.raises(QVLMError, match=message):
        read_conversations(folder / "bad.json", None, 1, 0)


def test_names_are_as_cameras_and_screenshots_write_them(folder):
    names = [
        "Screenshot 2026-01-02 at 3.04.05\u202fPM.png", "Bild\u00a0eins.png", "\u5199\u771f\u30001.png",
        "\U0001f468\u200d\U0001f469.png", "e\u0301te\u0301.png",
    ]  # fmt: skip
    for name in names:
        random_image(0).save(folder / name)
    (folder / "odd.json").write_text(json.dumps([row(0, image=name) for name in names]))
    assert len(read_conversations(folder / "odd.json", None, len(names), 0)) == len(names)
    for name in ("a\nb.png", "a\0.png", "\x7f.png", ""):
        (folder / "bad.json").write_text(json.dumps([row(0, image=[name])]))
        with pytest.raises(QVLMError, match="is not the name of a file"):
            read_conversations(folder / "bad.json", None, 1, 0)


def test_files_are_as_editors_write_them(folder):
    texts = ["a\u2028b", "c\u2029d", "e\x85f\u000bg", "h"]
    rows = [json.dumps(row(i, conversations=turns(text)), ensure_ascii=False) for i, text in enumerate(texts)]
    written = {
        "plain.jsonl": "\n".join(rows),
        "bom.jsonl": "\ufeff" + "\n".join(rows) + "\n",
        "blank.jsonl": "\n\n" + "\n \t\n".join(rows) + "\n\n  \n",
        "windows.jsonl": "\r\n".join(rows) + "\r\n\r\n",
        "bom.json": "\ufeff[" + ",\n".join(rows) + "]",
    }
    for name, text in written.items():
        (folder / name).write_bytes(text.encode())
        samples = read_conversations(folder / name, None, 4, 0)
        assert [sample.answer for sample in samples] == texts, name
    (folder / "bad.jsonl").write_text("\n".join([rows[0], "", "{", rows[1]]))
    with pytest.raises(QVLMError, match=r"bad\.jsonl' is not readable JSON: line 3: "):
        read_conversations(folder / "bad.jsonl", None, 1, 0)


def test_rows_without_an_image_are_told_with_the_key_and_the_keys_that_there_are(folder):
    for key in ("images", "img"):
        (folder / "other.json").write_text(json.dumps([{"id": "0", key: "0.png", "conversations": []}] * 2))
        with pytest.raises(
            QVLMError, match=f"has 0 rows with an image under the key 'image', .*conversations, id, {key}"
        ):
            read_conversations(folder / "other.json", None, 1, 0)


def turns(*answers, question="<image>\nWhat?"):
    return [
        turn for answer in answers for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    ]


def shown(folder, **changes):
    """What the only row of a file shows: how many images of which number, and the answer."""
    (folder / "one.json").write_text(json.dumps([row(0, **changes)]))
    (sample,) = read_conversations(folder / "one.json", None, 1, 0)
    pixels = [random_image(index).tobytes() for index in range(6)]
    return [pixels.index(image.tobytes()) for image in sample.conversation.images], sample.answer


def test_an_image_is_shown_with_the_question_that_places_it(folder):
    hello = turns("hello", question="Hi!")
    assert shown(folder, image="3.png", conversations=[*hello, *turns("that")]) == ([3], "that")
    assert shown(folder, image=["1.png", "2.png"], conversations=turns("one", "two")) == ([1], "one")
    both = turns("both", question="<image>\n<image>\nCompare.")
    three = {"image": ["4.png", "5.png", "0.png"], "conversations": [*hello, *both, *turns("last")]}
    assert shown(folder, **three) == ([4, 5], "both")
    assert shown(folder, image="3.png", conversations=hello) == ([3], "hello")


def test_an_answer_places_no_image(folder):
    assert shown(folder, image="3.png", conversations=turns("Write <image>.", question="How?"))[0] == [3]
    tag = turns("the <image> tag", question="Hi") + turns("y", question="B?")
    assert shown(folder, image="3.png", conversations=tag) == ([3], "the <image> tag")
    two = turns("Tag <image>", "y")
    assert shown(folder, image=["1.png", "2.png"], conversations=two) == ([1], "Tag <image>")
