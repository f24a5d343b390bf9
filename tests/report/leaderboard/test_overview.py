import numpy as np
import pytest
from report.leaderboard.written import DATA, content, provenance, samples, write, write_run

from qvlm_plugin.report.leaderboard.overview import overviews
from qvlm_plugin.report.leaderboard.ranking import rank
from qvlm_plugin.report.leaderboard.reading import read_board
from qvlm_plugin.report.leaderboard.schema import find_results_files
from qvlm_plugin.report.leaderboard.view import groups


def overview(folder, apart=False):
    board = rank(read_board(find_results_files([folder]), folder))
    found = groups(board.rows)
    return next(one for one in overviews(found, board.marks) if one.apart == apart), found


def scores(right, count=100):
    return [1] * right + [0] * (count - right)


def two_tasks(folder, method, scheme, right, **changes):
    data = {"quiz": DATA, "game": DATA}
    for task, count in zip(data, right, strict=True):
        facts = provenance(method, scheme, data=data, **changes)
        write_run(folder / f"{method}-{scheme}-{task}", scores(count), facts, task=task)


def test_a_configuration_is_one_row_over_its_benchmarks(tmp_path):
    two_tasks(tmp_path, "none", "w16a16", (90, 80))
    two_tasks(tmp_path, "rtn", "w4a4", (30, 20))
    write_run(tmp_path / "alone", scores(50), provenance("awq"), task="quiz")
    found, tables = overview(tmp_path)
    assert [tables[place].label for place in found.benchmarks] == ["game", "quiz"] and not found.others
    rows = {one.main.method: one for one in found.configurations}
    assert {name: len(one.entries) for name, one in rows.items()} == {"none": 2, "rtn": 2, "awq": 1}
    assert found.rank_intervals == {rows["none"].name: (1, 1), rows["rtn"].name: (2, 2)}  # awq lacks a benchmark
    assert not any(one.variant for one in found.configurations)


def test_seeds_are_averaged(tmp_path):
    for seed, right in enumerate((40, 60)):
        calibration = {"source": "quiz:train:64", "seed": seed, "documents_compared": 100}
        facts = provenance("qvlm", plan_hash=f"{seed}" * 64, calibration=calibration)
        write_run(tmp_path / str(seed), scores(right), facts)
    write_run(tmp_path / "other", scores(50), provenance("rtn"))
    found, _ = overview(tmp_path)
    rows = {one.main.method: one for one in found.configurations}
    assert [entry.main.seed for entry in rows["qvlm"].entries[0]] == [0, 1]
    assert found.rank_intervals == {row.name: (1, 2) for row in rows.values()}  # the mean of both is that of the other


def test_differences_are_named(tmp_path):
    options = {"group_size": 64, "norm": 2.0}
    write_run(tmp_path / "a", scores(40), provenance("rtn", options=options, backend="packed"))
    write_run(tmp_path / "b", scores(50), provenance("rtn", options=options | {"norm": 1.0}, backend="packed"))
    write_run(tmp_path / "c", scores(60), provenance("rtn", options=options, backend="reference"))
    found, _ = overview(tmp_path)
    variants = {one.main.file[0]: one.variant for one in found.configurations}
    assert variants == {"a": "norm=2.0, packed", "b": "norm=1.0, packed", "c": "norm=2.0, reference"}
    assert len({one.name for one in found.configurations}) == 3


def test_of_each_task_the_evaluation_of_most_runs_is_shown(tmp_path):
    for number in range(3):
        write_run(tmp_path / f"whole-{number}", scores(50), provenance(f"m{number}"))
    write_run(tmp_path / "long", scores(70, 200), provenance("m0"))
    write_run(tmp_path / "part", scores(9, 10), provenance("m1"), total=100)
    found, tables = overview(tmp_path)
    assert [tables[place].entries[0].main.documents for place in (*found.benchmarks, *found.others)] == [100, 200]
    apart, tables = overview(tmp_path, apart=True)
    assert [tables[place].entries[0].main.documents for place in apart.benchmarks] == [10]


@pytest.mark.parametrize("harm", ["no samples", "another metric", "calibrated"])
def test_without_paired_documents_there_are_no_places(tmp_path, harm):
    write_run(tmp_path / "good", scores(50), provenance("good"))
    if harm == "no samples":
        write(tmp_path / "bad", content(scores(60), provenance("bad")))
    elif harm == "another metric":
        whole = content(scores(60), provenance("bad"), metrics={"acc": 0.6})
        whole["configs"]["quiz"]["metric_list"].reverse()
        write(tmp_path / "bad", whole, samples(scores(60)))
    else:
        overlapping = {"source": "quiz:test:2", "documents_compared": 100, "documents_also_evaluated": 2}
        write_run(tmp_path / "bad", scores(60), provenance("bad", calibration=overlapping))
    found, _ = overview(tmp_path)
    named = {one.name: one.main.method for one in found.configurations}
    assert "bad" not in {named[name] for name in found.rank_intervals}


def test_places_agree_with_ranks_on_one_benchmark(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(9):
        right = (generator.random(100) < 0.3 + 0.05 * number).astype(int).tolist()
        write_run(tmp_path / str(number), right, provenance(f"m{number}"))
    found, tables = overview(tmp_path)
    ranks = {entry.main.method: (entry.main.rank_low, entry.main.rank_high) for entry in tables[0].entries}
    assert {one.main.method: found.rank_intervals[one.name] for one in found.configurations} == ranks
    assert any(high > low for low, high in ranks.values()) and any(low > 1 for low, _ in ranks.values())
