import json

import pytest
from tiny_llava import random_image
from typer.testing import CliRunner

from qvlm_plugin.cli import app
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.report.plan_figures import block_borders

PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("QVLM_CACHE", str(tmp_path / "cache"))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rows(folder, name, numbers):
    """A conversation file about as many different images."""
    content = []
    for number in numbers:
        random_image(number).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\nwhat is {number}?"}, {"from": "gpt", "value": "that"}]
        content.append({"image": f"{number}.png", "conversations": turns})
    (folder / name).write_text(json.dumps(content))
    return f"{folder / name}:{len(content)}"


def test_a_plan_is_drawn_from_its_record_and_against_the_layer_wise_search(tiny_llava, tmp_path):
    searched = run(
        "search", tmp_path / "plan", "--pretrained", tiny_llava, "--method", "qvlm", "--scheme", "w4a4",
        "--calibration", rows(tmp_path, "a.json", range(4)), "--option", "veo_epochs=1", "--option", "h0=0",
        "--option", "calibration_batch_size=4", "--option", "max_depth=2", "--option", "percentile_step=0.01",
    )  # fmt: skip
    assert searched.exit_code == 0, searched.output
    wrong = run("plot", tmp_path / "plan", "--pretrained", tiny_llava, "--router-noise-seed", "1")
    assert wrong.exit_code == 2 and "router_noise_seed is only for models" in wrong.stderr
    drawn = run(
        "plot", tmp_path / "plan", "--output", tmp_path / "figures", "--pretrained", tiny_llava,
        "--held-out", rows(tmp_path, "b.json", range(10, 13)),
    )  # fmt: skip
    assert drawn.exit_code == 0, drawn.output
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.{suffix}" for name in ("search", "veo", "errors") for suffix in ("png", "svg")}
    assert all(file.read_bytes().startswith(PNG) for file in (tmp_path / "figures").glob("*.png"))
    plan = RoundingPlan.load(tmp_path / "plan")
    blocks = plan.record["cdm"]["blocks"]
    assert block_borders(plan) == tuple(block["layers"][0] - 0.5 for block in blocks[1:])


def test_a_plan_without_a_record(tmp_path):
    RoundingPlan("rtn", "w4a4", {}, "model", ()).save(tmp_path / "plan")
    drawn = run("plot", tmp_path / "plan")
    assert drawn.exit_code == 2 and "method, rtn, records no search; qvlm and" in drawn.stderr
