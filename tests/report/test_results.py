import json

import pytest
from rich.console import Console

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.results import read_results, results_grid


def write(folder, name, score, *, effective=100, original=100, qvlm=None):
    content = {
        "results": {
            "quiz": {
                "alias": "quiz",
                "exact_match,none": score,
                "exact_match_stderr,none": 0.012,
                "exact_match_stderr_clt,none": 0.012,
            }
        },
        "n-samples": {"quiz": {"original": original, "effective": effective}},
    }
    if qvlm:
        content["qvlm"] = qvlm
    file = folder / f"{name}_results.json"
    file.write_text(json.dumps(content))
    return file


def test_scores_keep_their_error_count_and_provenance(tmp_path):
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper", "a", 0.5, effective=10, qvlm={"method": "rtn"})
    (score,) = read_results([tmp_path])
    assert (score.task, score.metric, score.value, score.stderr) == ("quiz", "exact_match", 0.5, 0.012)
    assert score.limited and score.documents == 10 and score.run == {"method": "rtn"}


def test_the_table_marks_stand_in_data_limits_and_foreign_runs(tmp_path):
    bits = {"decoder": {"weight": 4.127, "activation": 4.0}}
    qvlm = {"method": "qlora", "scheme": "w4a4", "bits": bits, "stand_in": True}
    files = [write(tmp_path, "a", 0.923, effective=50, qvlm=qvlm), write(tmp_path, "b", 0.5)]
    console = Console(width=200, record=True)
    console.print(results_grid(read_results(files)).rich())
    first, second = [line for line in console.export_text().splitlines() if "%" in line or "±" in line]
    assert all(
        text in first
        for text in ("qlora", "w4a4", "4.13 / 4", "92.3 ± 1.2", "50 documents per task, stand-in data, limited")
    )
    assert "50.0 ± 1.2" in second and "stand-in" not in second and "?" in second


def test_markdown_has_the_same_cells(tmp_path):
    grid = results_grid(read_results([write(tmp_path, "a", 0.5)]))
    lines = grid.markdown().splitlines()
    assert len(lines) == 3 and lines[2] == "| " + " | ".join(grid.rows[0]) + " |"
    assert "50.0 ± 1.2" in lines[2]


def test_what_is_not_a_results_file_is_named(tmp_path):
    with pytest.raises(QVLMError, match=r"has no \*_results\.json"):
        read_results([tmp_path])
    file = write(tmp_path, "a", 0.5)
    file.write_text(file.read_text()[:30])
    with pytest.raises(QVLMError, match=r"a_results\.json is not a results file"):
        read_results([tmp_path])
