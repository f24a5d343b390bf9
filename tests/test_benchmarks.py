"""The benchmarks run, at tiny sizes, and say what they measured."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def rows_of(monkeypatch, tmp_path):
    """Runs a benchmark in this process and returns the rows that it wrote."""

    def run(name, *arguments):
        monkeypatch.syspath_prepend(FOLDER)
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--json", str(tmp_path / "rows.json")])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return json.loads((tmp_path / "rows.json").read_text())

    return run


def test_kernels(rows_of):
    wanted = ["reference w4a4", "int4 w4a16", "int4 w4a4", "int4_folded w4a4", "int4_codes w4a4 token", "int8 w8a8"]
    sizes = ["--layouts", "demo", "--tokens", "1,70", "--copies", "1"]
    asked = [*sizes, "--rounds", "1", "--seconds", "0", "--variants", ",".join(wanted)]
    rows = rows_of("kernels.py", *asked)
    assert {(row["out_features"], row["tokens"]) for row in rows} >= {(192, 1), (1536, 70)}
    by_variant = {row["variant"]: row for row in rows if row["out_features"] == 1536 and row["tokens"] == 70}
    assert {"bf16", *wanted} <= by_variant.keys()
    assert by_variant["bf16"]["times_as_fast_as_bf16"] == 1
    kernels = [row for row in rows if not row["variant"].startswith("prepacked")]  # it saturates on older CPUs
    assert all(row["ms"] > 0 and row["relative_error"] < 0.15 for row in kernels)
    assert all(row["relative_error"] < 0.01 for row in kernels if "folded" not in row["variant"])
    assert by_variant["int4 w4a4"]["weight_bytes"] < 0.34 * by_variant["bf16"]["weight_bytes"]


def test_search(rows_of):
    rows = {row["search"]: row for row in rows_of("search.py", "--layout", "tiny", "--layers", "2")}
    assert rows["layer-wise"]["times_as_long_as_layer_wise"] == 1
    assert {"rtn", "qlora", "awq", "qvlm", "qvlm_jacobian"} < set(rows)
    assert all(row["seconds_per_layer"] > 0 and row["layers"] == 2 for row in rows.values())


def test_generate(tmp_path, warm_python):
    file = tmp_path / "rows.json"
    asked = ["--layout", "tiny", "--variants", "bf16,packed-w4a4", "--answers", "2,4", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, FOLDER / "generate.py", *asked, "--json", file], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    full, packed = json.loads(file.read_text())
    assert (full["variant"], packed["variant"]) == ("bf16", "packed-w4a4")
    assert full["kernels"] == {} and packed["kernels"] == {"int4": 22} and packed["fallbacks"] == 0
    assert packed["weight_bytes"] < full["weight_bytes"] and packed["weight_ratio"] < full["weight_ratio"] == 1
    for row in (full, packed):
        assert row["prefill_ms"] > 0 and row["load_s"] > 0 and row["seconds_4_out"] > 0
        assert row["peak_memory_bytes"] >= row["load_peak_bytes"] > row["weight_bytes"]


def test_peaks(warm_python):
    done = subprocess.run(
        [sys.executable, FOLDER / "peaks.py", "--layouts", "tiny"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[1] for row in rows] == ["rtn", "qlora", "awq", "qvlm", "qvlm_jacobian", "qvlm_rotated"]
