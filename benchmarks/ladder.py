"""The picture of the ladder in docs/results-demo.md: what each step from qlora to qvlm_rotated adds.

python benchmarks/ladder.py docs/ladder.svg docs/seeds:w4a4:32 docs/seeds/ladder:w4a3:64 docs/seeds/ladder:w3a3:64
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from seeds import LADDER, METRIC, Draw, draws, finished

from qvlm_plugin.atomic import write_file
from qvlm_plugin.report.figures import Bars, bars_figure
from qvlm_plugin.report.paired import AVERAGE
from qvlm_plugin.report.pooled import pool

SEEDS = (0, 1, 2)


def rungs(folder: Path, scheme: str, samples: int) -> Bars:
    """The tasks' average of each row of the ladder that has finished cells, over seeds, and full precision."""
    found = finished(draws([scheme], LADDER, [samples], SEEDS), folder)
    plain = found.pop(Draw())
    rows = {
        method: pool([(plain, run) for draw, run in found.items() if draw.method == method], METRIC)[-1].shown
        for method in dict.fromkeys(draw.method for draw in found)
    }
    return Bars(
        title=f"{scheme.upper()}, {samples} calibration samples",
        rows=tuple(rows),
        accuracies={AVERAGE: [*rows.values()]},
        lines={AVERAGE: pool([(plain, plain)], METRIC)[-1].shown[0]},
        line="full precision",
        costs=[None] * len(rows),
    )


def picture(groups: Sequence[str]) -> bytes:
    """Each group's rungs, one below the other, as SVG.

    Args:
        groups: a folder of seeds.py, a scheme and a number of calibration samples each, ``folder:scheme:samples``.
    """
    parts = [group.rsplit(":", 2) for group in groups]
    return bars_figure([rungs(Path(folder), scheme, int(samples)) for folder, scheme, samples in parts])["svg"]


def main() -> None:
    """Parse the command line and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="SVG file to write")
    parser.add_argument("groups", nargs="+", metavar="folder:scheme:samples", help="cells of seeds.py")
    arguments = parser.parse_args()
    write_file(arguments.file, picture(arguments.groups))


if __name__ == "__main__":
    main()
