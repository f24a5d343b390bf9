import pytest
from typer.testing import CliRunner

from qvlm_plugin.cli import app
from qvlm_plugin.doctor.finding import Status
from qvlm_plugin.doctor.search_memory import check_search_memory
from qvlm_plugin.plan_request import check_request


@pytest.mark.parametrize("method, steps", [("qvlm", ("lp", "vision", "blocks")), ("awq", ("awq", "lp"))])
def test_every_step_of_the_search_has_its_peak(method, steps, tiny_llava):
    (found,) = check_search_memory({"pretrained": str(tiny_llava)}, check_request(method, "w4a4", {}), 64, 600)
    assert found.status is Status.OK and all(f"{step} " in found.message for step in steps)
    assert "64 samples of 600 tokens" in found.message and "with --device_map offload" in found.message


def test_a_gpu_that_is_too_small_is_a_warning(tiny_llava, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (10**6, 10**9))
    (found,) = check_search_memory({"pretrained": str(tiny_llava)}, check_request("qvlm", "w4a4", {}), 64, 600)
    assert found.status is Status.WARN and "offload" in found.remedy


def test_full_precision_needs_no_search(tiny_llava):
    (found,) = check_search_memory({"pretrained": str(tiny_llava)}, check_request("none", "w4a4", {}), 64, 600)
    assert found.message == "method=none needs no search"


@pytest.mark.parametrize("arguments", [("--method", "qvlm"), ("--pretrained", "demo", "--option", "beam=2")])
def test_options_that_need_each_other(arguments):
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exit_code == 2 and "--method needs --pretrained" in done.stderr
