"""A stand-in for the harness's command line: it records its calls and writes results in the harness's layout."""

from pathlib import Path

SOURCE = """
import argparse, json, os, pathlib, sys, time

parser = argparse.ArgumentParser()
for name in ("model", "model_args", "tasks", "batch_size", "limit", "include_path", "output_path"):
    parser.add_argument(f"--{name}")
parser.add_argument("--log_samples", action="store_true")
asked = parser.parse_args()
if os.environ.get("RANK", "0") == "0":
    with open("calls.txt", "a") as calls:
        print(asked.model_args, os.environ.get("WORLD_SIZE", "1"), file=calls)
    arguments = dict(pair.split("=") for pair in asked.model_args.split(","))
    print("loading", end="\\r")
    if arguments.get("max_depth") == "4":
        sys.exit(print("QVLMError: too deep"))  # exits with 0, as the harness does
    limit = float(asked.limit) if asked.limit else None
    count = int(limit or 50)
    depth = float(arguments.get("max_depth", 3))
    score = {"exact_match,none": 0.5 + depth / 10, "exact_match_stderr,none": 0.02}
    scores = dict.fromkeys(asked.tasks.split(","), score)
    calibration = arguments.get("calibration") and {"source": arguments["calibration"]}
    content = {
        "results": scores,
        "n-samples": {task: {"original": 50, "effective": count} for task in scores},
        "config": {
            "model": asked.model,
            "model_args": asked.model_args,
            "limit": limit,
            "resolved_cli_args": {"tasks": asked.tasks},
        },
        "qvlm": {
            "method": arguments.get("method", "none"),
            "scheme": arguments.get("scheme", "w4a16"),
            "bits": {"decoder": {"weight": 4.5, "activation": 16}},
            "kernels": {"stub": 1},
            "search_seconds": 4.0**depth,
            "calibration": calibration,
            "stand_in": True,
        },
    }
    folder = pathlib.Path(asked.output_path) / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.time_ns()
    (folder / f"{stamp}_results.json").write_text(json.dumps(content))
    wrong = {"none": 0, "rtn": 20, "awq": 8}.get(arguments.get("method"), 10)
    for task in scores if asked.log_samples else ():
        rows = [
            {"doc_id": i, "target": "red", "input": f"question {i}", "filtered_resps": "red" if i >= wrong else "blue"}
            | {"exact_match": float(i >= wrong)}
            for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\\n" for row in rows)
        (folder / f"{stamp}_samples_{task}.jsonl").write_text(text)
"""


def write_stub(directory: Path) -> Path:
    """A working directory where ``python -m lmms_eval`` is the stub."""
    directory.mkdir(exist_ok=True)
    (directory / "lmms_eval.py").write_text(SOURCE)
    return directory


def calls(directory: Path) -> list[str]:
    """``model_args`` and number of processes of every call so far."""
    file = directory / "calls.txt"
    return file.read_text().splitlines() if file.is_file() else []
