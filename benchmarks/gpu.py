"""All benchmarks for a GPU in one command, which takes at most nine minutes.

It needs this package, torch and transformers. Each step is a benchmark of this folder with a time limit; a step that
fails or exceeds it does not stop the others. The rows are written to a folder, for `markdown.py`.

python benchmarks/gpu.py
python benchmarks/gpu.py --steps selftests,kernels --output /tmp/gpu
python benchmarks/gpu.py --device cpu --layout tiny --output /tmp/gpu                # try the command itself
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Step:
    """A benchmark.

    Attributes:
        script: file in this folder.
        arguments: arguments in addition to ``--device`` and ``--json``.
        seconds: time limit.
        has_layout: whether it takes ``--layout``, of the whole model.
    """

    script: str
    arguments: tuple[str, ...]
    seconds: int
    has_layout: bool = False


VARIANTS = "fp16,rotated-w4a4,packed-w4a16,rotated-w8a8,nf4"
STEPS = {
    "selftests": Step("selftests.py", (), 60),
    "kernels": Step("kernels.py", ("--layouts", "7b,13b", "--seconds", "0.2"), 90),
    "generate": Step("generate.py", ("--variants", VARIANTS, "--rounds", "2"), 210, True),
    "generate-compiled": Step(
        "generate.py", ("--variants", VARIANTS, "--rounds", "2", "--layers", "4", "--compile"), 120, True
    ),
    "search": Step("search.py", ("--layers", "1", "--samples", "4", "--methods", "qvlm_rotated"), 60),
}


def run(name: str, arguments: argparse.Namespace) -> str:
    """Run a step, and return a line that says how it ended."""
    step, file = STEPS[name], arguments.output / f"{name}-{arguments.device}.json"
    command = [
        sys.executable,
        str(FOLDER / step.script),
        *step.arguments,
        "--device",
        arguments.device,
        "--json",
        str(file),
    ]
    if step.has_layout:
        command += ["--layout", arguments.layout]
    print(f"\n{name}: {' '.join(command[1:])}", flush=True)
    start = time.perf_counter()
    try:
        status = subprocess.run(command, timeout=step.seconds).returncode
    except subprocess.TimeoutExpired:
        return f"{name}: not done in {step.seconds} s"
    ended = "done" if status == 0 else f"ended with status {status}"
    return f"{name}: {ended} in {time.perf_counter() - start:.0f} s" + (f", {file}" if file.exists() else "")


def main() -> int:
    """Run the steps; returns 1 if any has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command")
    parser.add_argument("--layout", default="llava-1.5-13b", help="layout for generate.py, such as llava-1.5-7b")
    parser.add_argument("--steps", default=",".join(STEPS), help="steps to run, separated by commas")
    parser.add_argument(
        "--output", type=Path, default=FOLDER.parent / "docs" / "performance", help="folder to write the rows to"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.steps.split(",")) - set(STEPS):
        parser.error(f"--steps: {', '.join(sorted(unknown))} is unknown; allowed are {', '.join(STEPS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    ends = [run(name, arguments) for name in arguments.steps.split(",")]
    print("", *ends, sep="\n")
    return 0 if all(": done" in end for end in ends) else 1


if __name__ == "__main__":
    raise SystemExit(main())
