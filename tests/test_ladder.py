"""The picture of the ladder: the document's figure is what the command draws."""

from pathlib import Path

import matplotlib
import pytest

DOCS = Path(__file__).parents[1] / "docs"
GROUPS = (f"{DOCS}/seeds:w4a4:32", f"{DOCS}/seeds/ladder:w4a3:64", f"{DOCS}/seeds/ladder:w3a3:64")


@pytest.fixture
def ladder(benchmark_module):
    return benchmark_module("ladder")


def test_rungs_are_means_over_draws_next_to_full_precision(ladder):
    folder, seeds = DOCS / "seeds" / "ladder", ladder.SEEDS
    bars = ladder.rungs(folder, "w4a3", 64)
    runs = ladder.finished((ladder.Draw("qlora", "w4a3", 64, seed) for seed in seeds), folder)
    marks = [run.tasks for run in runs.values()]
    scores = [one.metrics["exact_match"] for tasks in marks for documents in tasks.values() for one in documents]
    value, low, high = bars.accuracies["average"][bars.rows.index("qlora")]
    assert value == pytest.approx(100 * sum(scores) / len(scores)) and low < value < high
    assert bars.lines["average"] == pytest.approx(98.7, abs=0.05) and set(bars.rows) <= set(ladder.LADDER)


def test_the_picture_is_that_of_the_cells_that_are_kept(ladder):
    kept = (DOCS / "ladder.svg").read_bytes()
    if f"Matplotlib v{matplotlib.__version__}".encode() not in kept:
        pytest.skip("drawn by another version of matplotlib")
    assert ladder.picture(GROUPS) == kept
