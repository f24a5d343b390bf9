"""The benchmark that shows which bits to choose: the document is what the command prints."""

from pathlib import Path

import matplotlib
import pytest

DOCS = Path(__file__).parents[1] / "docs"
FOLDERS = [DOCS / "seeds", DOCS / "seeds" / "schemes"]


@pytest.fixture
def choose(benchmark_module):
    return benchmark_module("choose")


def test_the_documents_table_and_advice_are_what_the_command_prints(choose, capsys, monkeypatch):
    arguments = ["choose.py", "advise", *map(str, FOLDERS), "--memory", "200MB"]
    monkeypatch.setattr("sys.argv", arguments)
    choose.main()
    table, advice = capsys.readouterr().out.strip().split("\n\n")
    page = (DOCS / "choose.md").read_text()
    assert table.count("recommended") >= 1 and table in page and advice in page


def test_every_cell_has_a_size_by_its_scheme(choose):
    choices = choose.read_choices(FOLDERS)
    rotated = {one.scheme: one.packed_bytes for one in choices if one.method == "qvlm_rotated"}
    full = choose.read_run(FOLDERS[0], "full-precision").run["packed_bytes"]
    assert full == pytest.approx(313.2e6, rel=1e-3)  # docs/compare/comparison.md
    # Activations do not change the size of weights.
    assert rotated["w3a16"] < rotated["w4a3"] == rotated["w4a4"] == rotated["w4a8"] < rotated["w8a8"] < full


def test_the_picture_is_that_of_the_cells_that_are_kept(choose):
    kept = (DOCS / "choose.svg").read_bytes()
    if f"Matplotlib v{matplotlib.__version__}".encode() not in kept:
        pytest.skip("drawn by another version of matplotlib")
    assert choose.picture(choose.read_choices(FOLDERS)) == kept
