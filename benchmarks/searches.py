"""What Q-VLM's two steps did in the cells of seeds.py: dependencies, blocks, percentiles, and the loss of the training.

python benchmarks/searches.py docs/seeds/qvlm-w4a4-64-0.json docs/seeds/qvlm-w4a4-64-1.json
"""

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from qvlm_plugin.methods.qvlm.block_dependency import BEFORE
from qvlm_plugin.reading import read_json
from qvlm_plugin.report.results import Grid

HEADER = (
    "cell", "loss, before and after", "mean D(k, k+1), before and after", "of them above h0",
    "blocks of 1, 2, ... layers", "percentiles, share of sites",
)  # fmt: skip


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a plan's record that a cell keeps.

    Args:
        record: the plan's record (`RoundingPlan.record`).

    Returns:
        ``loss``: Eq. 10 before and after the tower was trained (if it is higher, the plan keeps the initial ratios);
        ``dependency``: the mean of the decoder's D(k, k+1) before and after it; ``above``: how many of them exceed the
        threshold h0, at both times; ``blocks``: the number of blocks with 1, 2, ... layers; ``percentiles``: the number
        of sites with each percentile. Without the training, or with a given h0, dependencies are those of the search
        alone. Steps that were not run are left out.
    """
    found: dict[str, Any] = {}
    if veo := record.get("veo"):
        found["loss"] = [veo[time]["total"] for time in ("before", "after")]
    if cdm := record.get("cdm"):
        times = [values for values in (record.get(BEFORE), cdm["dependencies"]) if values is not None]
        sizes = Counter(len(block["layers"]) for block in cdm["blocks"])
        chosen = Counter(
            percentile for block in cdm["blocks"] for layer in block["percentiles"] for percentile in layer.values()
        )
        found |= {
            "dependency": [mean(values) for values in times],
            "above": [sum(value > cdm["h0"] for value in values) for values in times],
            "blocks": [sizes[size] for size in range(1, max(sizes) + 1)],
            "percentiles": {str(percentile): chosen[percentile] for percentile in sorted(chosen, reverse=True)},
        }
    return found


def row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """A cell's row of the table, from its `summary`."""
    losses, means, above, blocks = (found.get(key, ()) for key in ("loss", "dependency", "above", "blocks"))
    percentiles = found.get("percentiles", {})
    shares = (f"{key}: {100 * count / sum(percentiles.values()):.0f} %" for key, count in percentiles.items())
    return (
        name,
        ", ".join(f"{loss:.3f}" for loss in losses),
        ", ".join(f"{value:.4f}" for value in means),
        ", ".join(map(str, above)),
        ", ".join(map(str, blocks)),
        "; ".join(shares),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, nargs="+", help="files of finished cells")
    rows = []
    for cell in parser.parse_args().cells:
        if (found := read_json(cell).get("search")) is None:
            parser.error(f"cells: {cell} does not keep what its search did; run the cell again with seeds.py")
        rows.append(row(cell.stem, found))
    print(Grid(HEADER, tuple(rows)).markdown())


if __name__ == "__main__":
    main()
