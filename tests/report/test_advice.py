"""Which scheme is recommended: by the interval of its difference from full precision, and its size."""

import json

import pytest
from report.logged import scored, write_run
from typer.testing import CliRunner

from qvlm_plugin.cli import app
from qvlm_plugin.commands.shared import parse_size
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.advice import Verdict, find_choices
from qvlm_plugin.report.samples import read_samples

N = 1000


def wrong(count):
    return [0] * count + [1] * (N - count)


@pytest.fixture
def runs(tmp_path):
    """Full precision and four schemes of one checkpoint over two tasks, one of them in a folder for each task."""

    def write(name, scheme, tasks, megabytes, **facts):
        shared = {"model_fingerprint": "f", "pretrained": "model", "backend": "reference", "dtype": "float32"}
        facts = shared | {"method": name.partition("-")[0], "scheme": scheme, "packed_bytes": megabytes * 1e6} | facts
        write_run(tmp_path / name, {task: scored(scores) for task, scores in tasks.items()}, qvlm=facts)

    write("none", "w16a16", {"quiz": wrong(0), "exam": wrong(10)}, 400)
    write("rtn-8", "w8a8", {"quiz": wrong(0), "exam": wrong(10)}, 200)
    write("rtn-4", "w4a4", {"quiz": wrong(3), "exam": wrong(12)}, 100)
    write("rtn-3-quiz", "w3a3", {"quiz": wrong(40)}, 75)
    write("rtn-3-exam", "w3a3", {"exam": wrong(60)}, 75)
    for seed, count in ((0, 1), (1, 60)):
        draw = {"source": "train:64", "seed": seed}
        write(f"awq-{seed}", "w4a4", {"quiz": wrong(count), "exam": wrong(10)}, 90, calibration=draw)
    return tmp_path


def choices(folder):
    found, trouble = find_choices(read_samples(folder), "exact_match")
    assert not trouble
    return {(one.method, one.scheme): one for one in found}


def test_verdicts_follow_the_intervals(runs):
    found = choices(runs)
    assert [*found] == [("rtn", "w3a3"), ("awq", "w4a4"), ("rtn", "w4a4"), ("rtn", "w8a8")]  # by size
    verdicts = {name: one.verdict(1.0) for name, one in found.items()}
    assert verdicts[("rtn", "w8a8")] is verdicts[("rtn", "w4a4")] is Verdict.RECOMMENDED
    assert verdicts[("rtn", "w3a3")] is Verdict.WORSE
    assert verdicts[("awq", "w4a4")] is Verdict.UNDECIDED and found["awq", "w4a4"].pooled.seeds == 2  # draws disagree
    assert found["rtn", "w3a3"].tasks == ("exam", "quiz") and found["rtn", "w3a3"].pooled.documents == 2 * N


def test_a_larger_tolerance_never_turns_a_recommendation_down(runs):
    order = [Verdict.WORSE, Verdict.UNDECIDED, Verdict.RECOMMENDED]
    for one in choices(runs).values():
        ranks = [order.index(one.verdict(tolerance)) for tolerance in (0, 0.1, 0.5, 1, 2, 5, 10, 100)]
        assert ranks == sorted(ranks) and ranks[-1] == 2


def test_identical_documents_still_leave_an_interval(runs, tmp_path):
    same = choices(runs)["rtn", "w8a8"]
    low, high = same.pooled.difference.low, same.pooled.difference.high
    assert same.pooled.difference.value == 0 and -high == low < -3 / (2 * N)
    for name in ("none", "rtn"):
        write_run(tmp_path / "few" / name, {"quiz": scored([1] * 20)}, qvlm={"method": name, "scheme": "w8a8"})
    assert choices(tmp_path / "few")["rtn", "w8a8"].verdict(1.0) is Verdict.UNDECIDED


def run(*arguments):
    return CliRunner().invoke(app, ["advise", *map(str, arguments)])


def test_the_smallest_recommended_scheme_that_fits_is_chosen(runs):
    shown = run(runs).stdout
    assert "Choose rtn w4a4, 100.0 MB: the smallest whose interval excludes a drop above 1 point" in shown
    assert "Also recommended: rtn w8a8, 200.0 MB" in shown and "Undecided" in shown and "train:64" in shown
    assert "for 95.0 MB: no interval excludes a drop" in run(runs, "--memory", "95MB").stdout
    assert "fits into 50.0 MB; the smallest is rtn w3a3, 75.0 MB" in run(runs, "--memory", "50MB").stdout
    assert "Choose rtn w3a3, 75.0 MB" in run(runs, "--tolerance", "20").stdout
    data = json.loads(run(runs, "--json").stdout)
    assert [row["verdict"] for row in data["choices"]] == ["loses more", "undecided", "recommended", "recommended"]


def test_speed_is_that_of_packed_runs(tmp_path):
    for name, backend in (("none", "reference"), ("rtn", "reference"), ("rtn-packed", "packed")):
        facts = {"method": name.partition("-")[0], "scheme": "w4a4", "backend": backend}
        file = write_run(tmp_path / name, {"quiz": scored([1, 0, 1])}, qvlm=facts)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"throughput": {"avg_speed": 12.5}}))
    rows = json.loads(run(tmp_path, "--json").stdout)["choices"]
    assert {row["variant"]: row["tokens_per_second"] for row in rows} == {
        "backend=reference": None,
        "backend=packed": 12.5,
    }


def test_choices_that_cannot_be_compared_are_named(runs, tmp_path):
    write_run(
        tmp_path / "other", {"quiz": scored([1])}, qvlm={"method": "rtn", "scheme": "w4a4", "model_fingerprint": "g"}
    )
    facts = {
        "method": "rtn",
        "scheme": "w6a6",
        "model_fingerprint": "f",
        "calibration": {"documents_also_evaluated": 1},
    }
    write_run(tmp_path / "cheat", {"quiz": scored(wrong(0))}, qvlm=facts)
    shown = run(runs)
    assert "rtn w4a4: there is no run of method=none with the same checkpoint; left out" in shown.stderr
    assert "rtn w6a6: calibrated on evaluated documents; left out" in shown.stderr
    alone = run(tmp_path / "other")
    assert alone.exit_code == 2 and "can be compared with full precision" in alone.stderr


def test_sizes_are_read_as_people_write_them():
    assert [parse_size(text, "--memory") for text in ("4GB", "3.5 gib", "500mb")] == [4e9, 3.5 * 2**30, 5e8]
    for text in ("4", "GB", "-1GB", "4 TBs"):
        with pytest.raises(QVLMError, match=r"^--memory .*such as 4GB"):
            parse_size(text, "--memory")
