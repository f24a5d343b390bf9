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


def test_it_says_that_codes_are_in_the_plan(loaded, tmp_path):
    nearest = planning.obtain_plan(loaded, check_request("rtn", "w4a16", {}), None, cache=None)
    plan, values = with_codes(nearest, loaded)
    said = shown(plan, tmp_path / "codes")
    assert f"of {len(values)} Linears are in the plan" in said and "int4 asymmetric g128 stored" in said
    assert "in the plan" not in shown(nearest, tmp_path / "nearest")


def test_it_says_that_inputs_are_rotated(loaded, tmp_path):
    plan = planning.obtain_plan(loaded, check_request("rtn", "w4a16", {}), None, cache=None)
    said = shown(rotated(plan), tmp_path / "rotated")
    assert "of the inputs of 18 sites" in said and "rotated 12x2, activation unquantized" in said
    assert "of the inputs of" not in shown(plan, tmp_path / "plain")
