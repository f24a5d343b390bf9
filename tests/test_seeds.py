"""The benchmark over draws of samples: exact matches with shared prefixes, and the table."""

import json
import sys

import pytest
import torch
from test_docs import ROOT, documented
from tiny_llava import random_image

from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError


@pytest.fixture
def benchmarks(benchmark_module):
    return benchmark_module("seeds"), benchmark_module("teacher_forced")


def question(teacher_forced, loaded, index, image, answer):
    """Questions are of several lengths."""
    images = [] if image is None else [random_image(image)]
    conversation = Conversation.from_prompt("what is it? " * (1 + index % 3), images)
    return teacher_forced.question_of(loaded, "task", index, conversation, answer)


@torch.inference_mode()
def test_exact_matches_agree_with_a_forward_pass_over_the_whole_answer(benchmarks, loaded, monkeypatch):
    _, teacher_forced = benchmarks
    monkeypatch.setattr(teacher_forced, "IMAGES_AT_A_TIME", 2)
    monkeypatch.setattr(teacher_forced, "QUESTIONS_AT_A_TIME", 3)
    image_token = loaded.model.config.image_token_id

    def said(asked):
        pixels = {} if asked.pixels is None else {"pixel_values": asked.pixels}
        inputs = torch.cat([asked.prefix, asked.tail])[None]
        return loaded.model(input_ids=inputs, **pixels).logits[0, -asked.answered - 1 : -1].argmax(dim=-1)

    questions, expected = [], {}
    for index in range(21):
        asked = question(teacher_forced, loaded, index, (None, 1, 1, 2, 3, 3, 3)[index % 7], "abc"[: 1 + index % 3])
        for _ in range(index % 2 and asked.answered):  # a random model is right only about what it says itself
            if image_token not in (answer := said(asked)):
                asked.tail[-asked.answered :] = answer
        questions.append(asked)
        expected["task", index] = torch.equal(said(asked), asked.tail[-asked.answered :])
    assert teacher_forced.exact_matches(loaded.model, questions) == expected
    assert sum(expected.values()) >= 5 and not all(expected.values())


def test_the_table_pairs_each_seed_with_its_own_baseline(benchmarks, tmp_path, capsys):
    seeds, _ = benchmarks
    right = {
        "full-precision": 40, "qlora-w4a4-32-0": 30, "qlora-w4a4-32-1": 20, "awq-w4a4-32-0": 36, "awq-w4a4-32-1": 28,
        "awq-w4a4-32-2": 40,
    }  # fmt: skip
    documents = {"one": [[index, str(index), "x"] for index in range(40)]}
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    for name, count in right.items():
        content = {
            "run": {"method": name, "calibration": {}, "bits": {"decoder": {"weight": 4.125, "activation": 4.0}}},
            "exact": {"one": f"{'1' * count:0<40}"},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    sys.stdout.flush()
    todo = [*seeds.draws(["w4a4"], ["qlora", "awq"], [32], [0, 1, 2])]
    seeds.show_table(todo, tmp_path, "qlora", [])
    printed = capsys.readouterr().out
    assert "awq w4a4 32 samples: 1 seeds have no qlora to compare with" in printed
    (row,) = (line for line in printed.splitlines() if line.startswith("| awq"))
    assert (
        "| w4a4 | 4.12 / 4 | 32 | 2 | one | 80.0 ±" in row and "(70.0 to 90.0) | +17.5 [" in row
    )  # 6 and 8 of 40 more
    assert "| full-precision | w16a16 | 4.12 / 4 |  | 1 | one | 100.0 [" in printed
    seeds.show_table(todo, tmp_path, "full-precision", ["one"])
    printed = capsys.readouterr().out
    (row,) = (line for line in printed.splitlines() if line.startswith("| awq"))
    assert "| 3 | one |" in row and "| -13.3 [" in row and "no full-precision" not in printed
    seeds.show_table(todo, tmp_path, "qlora", ["average"])
    assert "| awq" not in capsys.readouterr().out  # there is one task


def test_a_row_that_answers_as_its_baseline_has_a_difference_of_zero(benchmarks, tmp_path, capsys):
    seeds, _ = benchmarks
    (tmp_path / "documents.json").write_text(json.dumps({"one": [[index, str(index), "x"] for index in range(40)]}))
    for name in ("qlora-w8a8-32-0", "qlora-zero-w8a8-32-0"):
        content = {"run": {"method": "qlora"}, "exact": {"one": f"{'1' * 30:0<40}"}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    seeds.show_table([*seeds.draws(["w8a8"], ["qlora", "qlora-zero"], [32], [0])], tmp_path, "qlora", [])
    own, other = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| qlora"))
    assert own.endswith("|  |  |  |") and "| +0.0 [" in other


def test_cells_of_another_compute_type_are_refused(benchmarks, tmp_path):
    seeds, _ = benchmarks
    seeds._require_dtype(tmp_path, "bfloat16")
    (tmp_path / "documents.json").write_text('{"one": []}')
    (tmp_path / "full-precision.json").write_text('{"run": {"dtype": "torch.float32"}, "exact": {"one": ""}}')
    seeds._require_dtype(tmp_path, "float32")
    with pytest.raises(QVLMError, match="evaluated in float32; pass --dtype float32 or"):
        seeds._require_dtype(tmp_path, "bfloat16")


def test_a_cell_measured_with_other_options_is_refused(benchmarks, tmp_path):
    seeds, _ = benchmarks
    (tmp_path / "documents.json").write_text('{"one": []}')
    _, draw = todo = [*seeds.draws(["w4a4"], ["qlora-zero"], [32], [0])]
    options = draw.request.options.model_dump(mode="json")
    for recorded in ({}, options, options | {"zero_on_grid": False}):  # a cell may be older than an option
        content = {"run": {"method": "qlora", "options": recorded}, "exact": {"one": ""}}
        (tmp_path / f"{draw.name}.json").write_text(json.dumps(content))
        if recorded.get("zero_on_grid", True):
            assert [*seeds.finished(todo, tmp_path)] == [draw]
        else:
            with pytest.raises(QVLMError, match="measured with another zero_on_grid than its row has; remove it or"):
                seeds.finished(todo, tmp_path)


def test_the_ladder_compares_each_row_with_the_one_before(benchmarks, tmp_path, capsys):
    seeds, _ = benchmarks
    documents = {"one": [[index, str(index), "x"] for index in range(40)]}
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    cells = [*seeds.draws(["w4a4"], seeds.LADDER, [64], [0])]
    for draw, right in zip(cells[:6], (40, *(10 + index**2 for index in range(5))), strict=True):
        content = {"run": {"method": draw.method}, "exact": {"one": f"{'1' * right:0<40}"}}
        (tmp_path / f"{draw.name}.json").write_text(json.dumps(content))
    seeds.show_table(cells, tmp_path, "previous", [])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    steps = [-75.0, 2.5, 7.5, 12.5, 17.5]  # of 40 documents
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in (seeds.FULL_PRECISION, *seeds.LADDER[:5])]
    assert all(f"| {step:+.1f} [" in row for row, step in zip(rows[1:], steps, strict=True))


def test_draws_that_need_no_calibration_are_one_cell(benchmarks):
    seeds, _ = benchmarks
    rows = ("rtn-rotation", "rtn-rotation-gptq")
    names = {row: {draw.name for draw in [*seeds.draws(["w4a3"], [row], [32, 64], [0, 1])][1:]} for row in rows}
    assert names["rtn-rotation"] == {"rtn-rotation-w4a3"} and len(names["rtn-rotation-gptq"]) == 4


SHOWN = (9, 3, 5, 2, 5, 4, 9, 10, 9, 10, 6, 8, 4, 6, 5, 4)
"""Rows of each documented table, in the order of the pages."""


@pytest.mark.parametrize(("command", "shown"), zip(documented("benchmarks/seeds.py", "table"), SHOWN, strict=True))
def test_a_documented_table_is_what_its_command_prints(command, shown, benchmarks, monkeypatch, capsys):
    (seeds, _), (page, words) = benchmarks, command
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    seeds.main()
    table, _ = capsys.readouterr().out.split("\n\n")
    table = table[table.index("| method") :]  # after notes on missing cells
    assert table.count("\n| ") - 1 == shown
    assert f"{table}\n\n" in page.read_text()
