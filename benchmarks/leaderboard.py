"""Time and memory of a leaderboard of many runs, with synthetic results that are deleted afterwards.

python benchmarks/leaderboard.py            # 500 results files with 2,000 samples each
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from qvlm_plugin.memory import peak_memory
from qvlm_plugin.report.leaderboard.write import write_leaderboard
from qvlm_plugin.report.seal import seal

TASKS = ("scienceqa", "vizwiz_vqa_val", "vqav2_val", "qvlm_scienceqa")
QUESTION = "Which of these objects is the largest?\nAnswer the question using a single word or phrase."


def write_runs(folder: Path, files: int, samples: int) -> None:
    """Write ``files`` runs on the same ``samples`` documents, of four tasks."""
    count = samples // len(TASKS)
    for run in range(files):
        run_folder = folder / f"run-{run}"
        run_folder.mkdir()
        content = {
            "results": {task: {"exact_match,none": (count - run % count) / count} for task in TASKS},
            "n-samples": {task: {"original": count, "effective": count} for task in TASKS},
            "configs": {task: {"metric_list": [{"metric": "exact_match", "aggregation": "mean"}]} for task in TASKS},
            "versions": dict.fromkeys(TASKS, 1.0),
            "config": {"model": "qvlm_llava", "model_args": ""},
            "date": f"20261121_{run:06}",
            "qvlm": {"method": f"method {run}", "scheme": "w4a4", "plan_hash": f"{run:064}"},
        }
        content["qvlm"]["seal"] = seal(content)
        (run_folder / "r_results.json").write_text(json.dumps(content))
        for task in TASKS:
            with (run_folder / f"r_samples_{task}.jsonl").open("w") as stream:
                for index in range(count):
                    sample = {
                        "doc_id": index,
                        "target": "the box",
                        "filtered_resps": "the box",
                        "token_counts": [{"input_tokens": 640, "output_tokens": 3}],
                        "doc_hash": "0" * 64,
                        "exact_match": float(index >= run % count),
                        "input_media": [f"sha256:{index:064}"],
                        "input": f"{index}: {QUESTION}",
                    }
                    stream.write(json.dumps(sample) + "\n")


def main() -> None:
    """Write the runs, make the leaderboard, and print time and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=500, help="number of results files")
    parser.add_argument("--samples", type=int, default=2000, help="number of samples of each file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_runs(Path(name), arguments.files, arguments.samples)
        wall, cpu = time.perf_counter(), time.process_time()
        board = write_leaderboard([Path(name)], Path(name) / "out", with_reported=True)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = peak_memory(on_gpu=False) / 1e6
    print(f"{arguments.files} files, {arguments.files * arguments.samples:,} samples, {len(board.rows)} rows:")
    print(f"{wall:.1f} s wall, {cpu:.1f} s CPU, {peak:.0f} MB peak")
    assert not board.problems, board.problems[0]


if __name__ == "__main__":
    main()
