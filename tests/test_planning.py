import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_llava import random_image

from qvlm_plugin import planning
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods import qlora
from qvlm_plugin.plan import RoundingPlan


@pytest.mark.parametrize(
    "method, scheme, options, message",
    [
        ("gptq", "w4a4", {}, "method='gptq' is not known; allowed are awq, none, qlora, qvlm, qvlm_jacobian, rtn"),
        ("rtn", "w4", {}, "for example w4a4"),
        ("rtn", "w4a4", {"norm": 2}, "unknown argument 'norm'; method=rtn takes these options: weights, group_size"),
        ("none", "w4a4", {"weights": "nf"}, "these options: none"),
        ("qlora", "w4a4", {"norm": -1}, "norm=-1 is not allowed for method=qlora"),
        ("qlora", "w4a4", {"weights": "fp8"}, "weights='fp8' is not allowed"),
    ],
)
def test_bad_requests_are_one_line_and_say_what_is_allowed(method, scheme, options, message):
    with pytest.raises(QVLMError, match=message) as caught:
        planning.check_request(method, scheme, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["rtn", "qlora", "awq", "qvlm"])
def test_fewer_samples_than_a_batch_are_refused_before_work(method, loaded, calibration, monkeypatch):
    monkeypatch.setattr(loaded.model, "forward", lambda *args, **kwargs: pytest.fail("ran the model"))
    request = planning.check_request(method, "w4a4", {"calibration_batch_size": 6})
    message = r"calibration='memory' has 5 samples, .*calibration_batch_size=6; draw at least 6 .* to at most 5"
    with pytest.raises(QVLMError, match=message) as caught:
        planning.obtain_plan(loaded, request, calibration, None)
    assert "\n" not in str(caught.value)
    planning.check_calibration(planning.check_request(method, "w4a4", {"calibration_batch_size": 5}), calibration)
    planning.check_calibration(planning.check_request(method, "w16a16", {}), None)


@pytest.mark.parametrize("method", ["rtn", "qlora", "awq", "qvlm"])
def test_a_model_without_the_blocks_of_its_topology_is_refused_before_work(method, loaded, calibration, monkeypatch):
    monkeypatch.setattr(loaded.model, "forward", lambda *args, **kwargs: pytest.fail("ran the model"))
    monkeypatch.delattr(loaded.model.model.language_model, "layers")
    request = planning.check_request(method, "w4a4", {"calibration_batch_size": 2})
    with pytest.raises(QVLMError, match=r"names 'model\.language_model\.layers', which .* does not have") as caught:
        planning.obtain_plan(loaded, request, calibration, None)
    assert "\n" not in str(caught.value)


def test_the_second_run_loads_what_the_first_searched(loaded, calibration, tmp_path, monkeypatch):
    request = planning.check_request("qlora", "w4a4", {"calibration_batch_size": 2})
    first = planning.obtain_plan(loaded, request, calibration, tmp_path)
    monkeypatch.setattr(qlora, "search_ranges", lambda *args: pytest.fail("searched again"))
    again = planning.obtain_plan(loaded, request, calibration, tmp_path)
    assert again.hash == first.hash and again.search_seconds == first.search_seconds > 0


def test_a_damaged_cache_entry_is_searched_anew(loaded, calibration, tmp_path):
    request = planning.check_request("rtn", "w8a8", {"calibration_batch_size": 5})
    first = planning.obtain_plan(loaded, request, calibration, tmp_path)
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (entry / "plan.safetensors").write_bytes(b"rubbish")
    assert planning.obtain_plan(loaded, request, calibration, tmp_path).hash == first.hash
    assert RoundingPlan.load(entry).hash == first.hash


def test_the_key_follows_all_that_decides_the_plan(loaded, calibration, monkeypatch):
    def key(method="qlora", scheme="w4a4", samples=calibration, **options):
        return planning.cache_key(loaded, planning.check_request(method, scheme, options), samples)

    fewer = replace(calibration, samples=calibration.samples[1:])
    variants = [key(), key("rtn"), key(scheme="w4a8"), key(norm=1), key(samples=fewer), key(samples=None)]
    assert len(set(variants)) == len(variants) and key() == variants[0]
    monkeypatch.setattr(planning, "sources_digest", lambda package: f"another {package}")
    assert key() != variants[0]


def test_processes_that_want_the_same_plan_search_it_once(tiny_llava, tmp_path):
    for index in range(8):
        random_image(index).save(tmp_path / f"{index}.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    rows = [{"image": f"{index}.png", "conversations": turns} for index in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from qvlm_plugin.calibration import read_calibration
        from qvlm_plugin.methods import rtn
        from qvlm_plugin.models.loading import load
        from qvlm_plugin.planning import check_request, obtain_plan

        observe = rtn.observe_ranges
        def counted(*args):
            with open({str(tmp_path / "searches")!r}, "a") as log:
                log.write("searched\\n")
            return observe(*args)
        rtn.observe_ranges = counted
        loaded = load({str(tiny_llava)!r})
        calibration = read_calibration({str(tmp_path / "rows.json")!r} + ":8", None, 0, None)
        request = check_request("rtn", "w4a4", {{}})
        print(obtain_plan(loaded, request, calibration, Path({str(tmp_path / "cache")!r})).hash)
    """)
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs[0][1]
    assert len({stdout.strip() for stdout, _ in outputs}) == 1
    assert (tmp_path / "searches").read_text() == "searched\n"
    assert len([path for path in Path(tmp_path / "cache").iterdir() if path.is_dir()]) == 1
