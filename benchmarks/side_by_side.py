"""Time alternatives in turns, so that other load on the machine affects all of them equally; describe the machine."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qvlm_plugin.atomic import write_file

# Libraries import a package named `kernels`, so the benchmark of that name must not come first in the path.
_HERE = str(Path(__file__).parent)
if sys.path[0] == _HERE:
    sys.path.append(sys.path.pop(0))


@dataclass(frozen=True)
class Times:
    """Seconds of one alternative, one sample from each round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the interquartile range, relative to the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    def faster_than(self, other: "Times") -> float:
        """The speed-up over the other: the median of the ratios of their times in the same round."""
        pairs = zip(self.samples, other.samples, strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)

    def __str__(self) -> str:
        return f"{1e3 * self.median:.3g} ±{100 * self.spread:.0f} %"


def time_in_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, seconds: float = 0.0
) -> dict[str, Times]:
    """Run every alternative once untimed, then each of them once in every round.

    Args:
        runs: runs by name.
        rounds: minimum number of rounds.
        device: device on which the runs compute.
        seconds: minimum time of all rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    begin = time.perf_counter()
    while len(next(iter(samples.values()))) < rounds or time.perf_counter() - begin < seconds:
        for name, run in runs.items():
            samples[name].append(seconds_of(run, device))
    return {name: Times(tuple(values)) for name, values in samples.items()}


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of a run, until the device has finished."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> str:
    """The processor with its memory, and the version of torch."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        found = torch.cpu.get_capabilities()
        bf16 = next((name for name in ("amx_bf16", "avx512_bf16") if found.get(name)), "no bfloat16 instructions")
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA")  # oneDNN then leaves newer instructions out
        instructions = f"{bf16}, oneDNN limited to {limit}" if limit else bf16
        where = f"{_processor()}, {torch.get_num_threads()} threads, {instructions}, {memory:.0f} GB"
    return f"{where}; torch {torch.__version__}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; all columns but the first are right-aligned."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(Console().width, 180)).print(table)


def write_rows(file: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a JSON list, if a file is given."""
    if file is not None:
        write_file(file, (json.dumps(list(rows), indent=1) + "\n").encode())
