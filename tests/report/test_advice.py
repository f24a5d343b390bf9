import json
import math

import pytest
from report.logged import scored, write_run
from test_cli import run

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.advice import KEPT, LOST, UNDECIDED, advice_text, choose, judge, options_of
from qvlm_plugin.report.paired import Estimate
from qvlm_plugin.report.samples import read_samples

DOCUMENTS = 400


def write(folder, method, scheme="w4a4", wrong=0, packed=None, **facts):
    """A run of one task, of whose documents the first few are wrong."""
    scores = [0] * wrong + [1] * (DOCUMENTS - wrong)
    qvlm = {"method": method, "scheme": scheme, "pretrained": "model", "backend": "reference", "packed_bytes": packed}
    write_run(folder, {"quiz": scored(scores)}, qvlm=qvlm | facts)


def draw(seed):
    return {"calibration": {"source": "train.json:32", "seed": seed, "documents": 32}}


@pytest.fixture
def runs(tmp_path):
    write(tmp_path / "full", "none", "w16a16", packed=14 * 10**9)
    write(tmp_path / "w8", "rtn", "w8a8", packed=8 * 10**9)
    write(tmp_path / "w4", "good", wrong=1, packed=4 * 10**9, **draw(0))
    write(tmp_path / "w4-1", "good", wrong=0, packed=4 * 10**9, **draw(1))
    write(tmp_path / "w4-bad", "bad", wrong=80, packed=4 * 10**9 - 1)
    write(tmp_path / "w3", "good", "w3a3", wrong=4, packed=3 * 10**9, **draw(0))
    return tmp_path


def options(folder, tolerance=1.0):
    return options_of(read_samples(folder), "exact_match", tolerance)


def test_each_option_is_judged_by_its_interval(runs):
    found = {one.name: one for one in options(runs)}
    assert [*found] == ["good w3a3", "bad w4a4", "good w4a4", "rtn w8a8"]  # by size
    judgements = {name: one.judgement for name, one in found.items()}
    assert judgements == {"good w3a3": UNDECIDED, "bad w4a4": LOST, "good w4a4": KEPT, "rtn w8a8": KEPT}
    assert found["good w4a4"].pooled.seeds == 2 and found["good w3a3"].pooled.difference.value == -0.01
    assert {one.name: one.judgement for one in options(runs, 5.0)}["good w3a3"] == KEPT


@pytest.mark.parametrize(
    "low, high, expected",
    [(-0.01, 0.5, KEPT), (-0.02, -0.005, UNDECIDED), (-0.5, -0.011, LOST), (math.nan, math.nan, UNDECIDED)],
)
def test_the_whole_interval_counts(low, high, expected):
    assert judge(Estimate(0.0, 0.0, low, high), 0.01) == expected


def test_the_smallest_is_chosen_and_in_a_budget_the_most_accurate(runs):
    found = options(runs)
    assert choose(found, None).name == "good w4a4"
    assert choose(found, 9e9).name == "rtn w8a8" and choose(found, 5e9).name == "good w4a4"
    assert choose(found, 3.5e9).judgement == UNDECIDED and choose(found, 2e9) is None
    bad = [one for one in found if one.name == "bad w4a4"]
    assert choose(bad, None) is None and "Nothing stays within 1 points" in advice_text(bad, None, 1)


def test_the_command(runs):
    shown = run("advise", runs, "--memory", "3.5")
    assert shown.exit_code == 0, shown.output
    assert "Nothing in 3.50 GB is known to stay within 1 points. Closest is good w3a3 (3.00 GB, -1.00 [" in shown.stdout
    assert "the smallest is good w3a3 with 3.00 GB" in run("advise", runs, "--memory", "2").stdout
    assert "Use good w4a4 (4.00 GB, " in run("advise", runs).stdout
    rows = json.loads(run("advise", runs, "--json").stdout)
    assert [row["scheme"] for row in rows if row["chosen"]] == ["w4a4"] and len(rows) == 4


def test_speed_is_shown_of_packed_runs_alone(runs):
    assert all(one.tokens_per_second is None for one in options(runs))
    assert "simulates low bits" in run("advise", runs).stdout


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    with pytest.raises(QVLMError, match="0 runs of full precision"):
        options(runs / "w4")
    with pytest.raises(QVLMError, match="no run of a quantized model"):
        options(runs / "full")
    write(tmp_path / "other", "rtn", pretrained="another")
    with pytest.raises(QVLMError, match="of 2 models; name those of one"):
        options(tmp_path)
