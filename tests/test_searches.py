"""What cells keep of a search's course, and the table of it."""

import json
import sys

import pytest
from test_docs import ROOT, documented

from qvlm_plugin import planning
from qvlm_plugin.plan_request import check_request


@pytest.fixture
def searches(benchmark_module):
    return benchmark_module("searches")


def summary_of(searches, loaded, calibration, **options):
    request = check_request("qvlm", "w4a4", {"calibration_batch_size": 5, **options})
    plan = planning.obtain_plan(loaded, request, calibration, None)
    return searches.summary(plan.record), plan


def test_the_summary_of_a_search_counts_its_layers_and_sites(searches, loaded, calibration):
    found, plan = summary_of(searches, loaded, calibration, veo_epochs=1)
    layers = loaded.model.config.text_config.num_hidden_layers
    assert sum(size * count for size, count in enumerate(found["blocks"], 1)) == layers
    assert sum(found["percentiles"].values()) == 4 * layers  # queries, output, gate, down
    assert found["loss"] == [plan.record["veo"][time]["total"] for time in ("before", "after")]
    assert len(found["dependency"]) == len(found["above"]) == 2
    assert found["dependency"][1] == pytest.approx(sum(plan.record["cdm"]["dependencies"]) / (layers - 1))


def test_steps_that_were_not_run_are_left_out(searches, loaded, calibration):
    found, plan = summary_of(searches, loaded, calibration, veo=False, h0=0.0)
    assert "loss" not in found and len(found["dependency"]) == 1
    assert found["above"] == [len(plan.record["cdm"]["dependencies"])]  # all are above a threshold of 0
    assert summary_of(searches, loaded, calibration, veo=False, cdm=False)[0] == {} == searches.summary({})


def test_a_cell_is_a_row_and_one_without_a_summary_an_error(searches, tmp_path, capsys, monkeypatch):
    found = {"loss": [3.5, 3.25], "dependency": [2.0, 1.5], "above": [3, 2], "blocks": [4, 0, 1]}
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    new.write_text(json.dumps({"search": found | {"percentiles": {"1.0": 1, "0.98": 3}}}))
    old.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["searches.py", str(new)])
    searches.main()
    assert "| new | 3.500, 3.250 | 2.0000, 1.5000 | 3, 2 | 4, 0, 1 | 1.0: 25 %; 0.98: 75 % |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["searches.py", str(new), str(old)])
    with pytest.raises(SystemExit):
        searches.main()
    assert "old.json does not keep what its search did" in capsys.readouterr().err


def test_the_documents_table_is_what_its_command_prints(searches, capsys, monkeypatch):
    ((page, words),) = documented("benchmarks/searches.py")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    searches.main()
    assert f"{capsys.readouterr().out.strip()}\n\n" in page.read_text()
