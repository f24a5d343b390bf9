"""``--json``: what tables show, as data."""

import json

from report.logged import scored, write_run
from typer.testing import CliRunner

from qvlm_plugin import planning
from qvlm_plugin.cli import app
from qvlm_plugin.plan_request import check_request


def printed(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def runs(folder):
    """Two runs of 40 documents: the second gets 8 wrong that the first gets right, and 2 the other way round."""
    facts = {"bits": {"decoder": {"weight": 4.5, "activation": 4}}, "packed_bytes": 5, "backend": "packed"}
    first = write_run(folder / "one", {"quiz": scored([0] * 2 + [1] * 38)}, qvlm={"method": "none", "scheme": "w16a16"})
    second = scored([1] * 2 + [0] * 8 + [1] * 30)
    return first, write_run(folder / "two", {"quiz": second}, qvlm={"method": "rtn", "scheme": "w4a4", **facts})


def test_results(tmp_path):
    files = runs(tmp_path)
    one, two = printed("results", *files)
    assert (one["method"], two["method"], two["scheme"], two["packed_bytes"]) == ("none", "rtn", "w4a4", 5)
    assert (two["task"], two["metric"], two["file"]) == ("quiz", "exact_match", str(files[1]))
    assert two["bits"]["decoder"]["weight"] == 4.5 and one["bits"] is None and not two["limited"]


def test_paired(tmp_path):
    (row,) = printed("paired", *runs(tmp_path))
    assert (row["task"], row["documents"], row["broke"], row["fixed"]) == ("quiz", 40, 8, 2)
    assert row["difference"] == -0.15 and row["difference_low"] < -0.15 < row["difference_high"]
    assert row["p"] == row["p_holm"] and 0 < row["p"] < 0.2


def test_inspect(loaded, tmp_path):
    plan = planning.obtain_plan(loaded, check_request("rtn", "w4a16", {}), None, cache=None)
    folder = plan.save(tmp_path / "plan")
    found = printed("inspect", folder)
    assert found["plan_hash"] == plan.hash and found["method"] == "rtn" and found["bits"] == plan.effective_bits()
    assert "modules" not in found
    modules = printed("inspect", folder, "--modules")["modules"]
    assert [module["name"] for module in modules] == [module.name for module in plan.modules]
