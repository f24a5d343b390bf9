"""Check each kernel against the reference on a device: its self-test, for each format that it supports.

python benchmarks/selftests.py
python benchmarks/selftests.py --device cuda --json selftests-cuda.json
"""

import argparse
from itertools import product
from pathlib import Path

import torch
from side_by_side import machine, show, write_rows

from qvlm_plugin.backends import all_kernels
from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.selftest import SHAPE, self_test

WEIGHTS = (
    *(WeightFormat(kind="int", bits=bits, group_size=128) for bits in (3, 4, 6, 8)),
    WeightFormat(kind="int", bits=4, group_size=64, progressive=True),
    *(WeightFormat(kind="nf", bits=bits, double_quantization=True) for bits in (4, 8)),
)
ACTIVATIONS = (
    ActivationFormat(),
    *(ActivationFormat(kind="static_channel", bits=bits) for bits in (4, 8)),
    *(ActivationFormat(kind="dynamic_token", bits=bits) for bits in (4, 8)),
    ActivationFormat(kind="dynamic_token", bits=4, centered=True),
)


def main() -> int:
    """Test, print and write the rows; returns 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    device, rows = torch.device(arguments.device), []
    for kernel, weight, activation in product(all_kernels().values(), WEIGHTS, ACTIVATIONS):
        if kernel.obstacle(weight, activation, SHAPE, device) is None:
            failure = self_test(kernel, weight, activation, device)
            formats = {"weight": str(weight), "activation": str(activation)}
            rows.append({"kernel": kernel.name, **formats, "failure": failure, "machine": machine(device)})
    failed = [row for row in rows if row["failure"]]
    cells = [(row["kernel"], row["weight"], row["activation"], row["failure"]) for row in failed]
    title = f"{len(rows) - len(failed)} of {len(rows)} self-tests pass; {machine(device)}"
    show(title, ["kernel", "weight", "activation", "failure"], cells)
    write_rows(arguments.json, rows)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
