"""The script that evaluates others' checkpoints, with a stand-in for the harness."""

import json

from report.stub_harness import calls, write_stub


def test_each_folder_has_a_row_that_says_whether_it_loads(benchmark_module, tmp_path, monkeypatch, capsys):
    others = benchmark_module("others")
    place = write_stub(tmp_path / "place")
    stub = place / "lmms_eval.py"
    stub.write_text(
        stub.read_text().replace('arguments.get("max_depth") == "4"', '"auto-round-gptq" in asked.model_args')
    )
    monkeypatch.chdir(place)
    for name, stored in (
        ("auto-round-gptq", {"quant_method": "gptq", "checkpoint_format": "gptq"}),
        ("auto-round-awq", {"quant_method": "awq", "version": "gemm"}),
        ("gptqmodel-awq", {"quant_method": "awq", "format": "gemm", "checkpoint_format": "gemm"}),
    ):
        (tmp_path / "theirs" / name).mkdir(parents=True)
        (tmp_path / "theirs" / name / "config.json").write_text(json.dumps({"quantization_config": stored}))
    for _ in range(2):  # finished runs are not run again
        others.table(tmp_path / "theirs", 40, list(others.WRITERS))
    lines = capsys.readouterr().out.splitlines()
    named = {row[0]: row[1:] for row in ([cell.strip() for cell in line.strip("| ").split("|")] for line in lines)}
    assert named["demo"] == ["", "yes", "4.50 / 16", "stub", "80", "80", "80"]
    assert (
        named["auto-round-awq"] == named["gptqmodel-awq"] == ["awq gemm", "yes", "4.50 / 16", "stub", "80", "80", "80"]
    )
    assert named["auto-round-gptq"][:2] == ["gptq gptq", "QVLMError: too deep"] and "bitsandbytes-nf4" not in named
    ran = [call.split(",")[0].rpartition("/")[2].removeprefix("pretrained=") for call in calls(place)]
    assert ran == ["demo", "auto-round-gptq", "auto-round-awq", "gptqmodel-awq", "auto-round-gptq"]
