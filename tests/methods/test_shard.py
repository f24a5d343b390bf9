"""Several processes find the plan that one does, and fail together. They start at once (`warm`)."""

import json
import os
import socket
import subprocess
import sys

import pytest
from commands.test_plot import rows

from qvlm_plugin.commands.processes import run_together
from qvlm_plugin.methods.shard import OrderedSum, Shard, join_processes
from qvlm_plugin.plan import RoundingPlan

pytestmark = pytest.mark.usefixtures("warm_python")

EXAMPLES = {
    "qvlm": {"beam": 2, "unit": "site"},
    "qvlm_jacobian": {"cdm": True},
    # One batch for all: a process has none.
    "awq": {"alpha_steps": 3, "bias_correction": True, "cdm": True, "calibration_batch_size": 5},
    "qlora": {"cdm": True, "dependency": "output", "calibration_batch_size": 5},
    "rtn": {"transform": "smooth", "weights": "nf"},
    "qvlm_rotated": {"group_size": 8, "importance": "modality", "correction": 0.1, "max_percentile": 1},
}
COMMON = {"veo_epochs": 1, "min_percentile": 0.98, "percentile_step": 0.01, "h0": 0, "calibration_batch_size": 2}

SEARCHING = """
import json, sys
from pathlib import Path
from qvlm_plugin.calibration import read_calibration
from qvlm_plugin.methods.shard import join_processes
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.planning import obtain_plan

shard, (model, rows, examples, cache) = join_processes(), sys.argv[1:]
loaded, samples = load(model, dtype="float32"), read_calibration(rows, None, 0, None)
found = {}
for method, options in json.loads(examples).items():
    request = check_request(method, "w4a4", options)
    plan = obtain_plan(loaded, request, samples, Path(cache), shard)
    assert obtain_plan(loaded, request, samples, Path(cache), shard).search_seconds == plan.search_seconds
    found[method] = plan.hash, plan.record, plan.calibration.digests
print(json.dumps(found))
"""


def run_in(count, code, *arguments):
    """What each of so many processes that know each other prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [child.communicate(timeout=600) for child in children]
    assert not any(child.returncode for child in children), outputs
    return [output.splitlines() for output, _ in outputs]


def test_two_processes_find_the_plans_of_one(tiny_llava, tmp_path):
    source = rows(tmp_path, "a.json", range(5))  # three batches: one for one process, two for the other
    examples = {method: COMMON | options for method, options in EXAMPLES.items()}
    arguments = SEARCHING, tiny_llava, source, json.dumps(examples)
    (together, other), (alone,) = (run_in(count, *arguments, tmp_path / f"cache-{count}") for count in (2, 1))
    assert together == other == alone and set(json.loads(alone[-1])) == set(EXAMPLES)


def test_the_command_starts_them_and_ends_as_one(tiny_llava, tmp_path):
    command = [
        sys.executable, "-m", "qvlm_plugin", "search", tmp_path / "plan", "--pretrained", tiny_llava, "--method", "rtn",
        "--calibration", rows(tmp_path, "a.json", range(5)), "--option", "calibration_batch_size=2", "--processes", "2",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QVLM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and done.stdout.splitlines() == [str(tmp_path / "plan")], done.stderr
    assert "ranges: 1 of 1" in done.stderr
    assert RoundingPlan.load(tmp_path / "plan").method == "rtn"


def test_where_one_fails_the_command_does(capfd):
    assert run_together(2, ["search", "--no-such-option"]) == 2
    assert capfd.readouterr().err.count("No such option") == 1  # one speaks for all


FAILING = """
import torch
from qvlm_plugin.methods.shard import join_processes

shard = join_processes()
for failure in (torch.OutOfMemoryError("two GiB"), ValueError("what")):
    try:
        with shard.together():
            shard.gathered([shard.rank])
            if shard.rank == 1:
                raise failure
            shard.gathered([shard.rank])
    except Exception as error:
        print(shard.rank, isinstance(error, torch.OutOfMemoryError), error, flush=True)
with shard.together():
    print(shard.rank, shard.gathered([shard.rank, 10 * shard.rank]), shard.first(lambda: shard.rank), flush=True)
"""


def test_what_fails_in_one_process_fails_in_all_and_they_go_on_together():
    outputs = run_in(2, FAILING)
    for lines, rank in zip(outputs, (0, 1), strict=True):
        prefix = ("process 1: ", "")[rank]
        assert lines == [
            f"{rank} True {prefix}two GiB", f"{rank} False {prefix}what", f"{rank} [0, 0, 1, 10] 0"
        ]  # fmt: skip


SUMMING = """
import torch
from qvlm_plugin.methods.shard import OrderedSum, join_processes

shard = join_processes()
sums, values = OrderedSum(shard), torch.rand(7, generator=torch.Generator().manual_seed(0)).mul(2).exp()
for index in shard.own(range(7)):
    sums.add({"all": values[index] * 1e3 ** (index % 3), index % 2: values[index]})
print(*((key, value.item()) for key, value in sums.total().items()), flush=True)
"""


def test_several_processes_sum_in_the_order_of_one(capsys):
    exec(SUMMING, {})
    assert run_in(2, SUMMING) == [capsys.readouterr().out.splitlines()] * 2


def test_parts_follow_one_another_and_make_the_whole():
    for count in (1, 2, 3, 7):
        parts = [Shard(rank, count).own(range(5)) for rank in range(count)]
        assert [item for part in parts for item in part] == list(range(5))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert Shard().gathered([1, 2]) == [1, 2] and Shard().first(lambda: 3) == 3


def test_sums_by_key():
    sums = OrderedSum(Shard())
    for found in ({"b": 1, "a": 2}, {"a": 3}, {"c": 4}):
        sums.add(found)
    assert json.dumps(sums.total()) == '{"b": 1, "a": 5, "c": 4}'


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes() == Shard(0, 1)
