from rotations import rotated
from stored_codes import with_codes
from typer.testing import CliRunner

from qvlm_plugin import planning
from qvlm_plugin.cli import app
from qvlm_plugin.plan_request import check_request


def shown(plan, folder):
    done = CliRunner().invoke(app, ["inspect", str(plan.save(folder)), "--modules"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_it_shows_that_the_plan_has_codes(loaded, tmp_path):
    nearest = planning.obtain_plan(loaded, check_request("rtn", "w4a16", {}), None, cache=None)
    plan, values = with_codes(nearest, loaded)
    text = shown(plan, tmp_path / "codes")
    assert f"for {len(values)} Linears" in text and "int4 asymmetric g128 stored" in text
    assert "codes" not in shown(nearest, tmp_path / "nearest")


def test_it_shows_rotated_inputs(loaded, tmp_path):
    plan = planning.obtain_plan(loaded, check_request("rtn", "w4a16", {}), None, cache=None)
    text = shown(rotated(plan), tmp_path / "rotated")
    assert "inputs of 18 sites" in text and "rotated 12x2, activation unquantized" in text
    assert "rotations" not in shown(plan, tmp_path / "plain")
