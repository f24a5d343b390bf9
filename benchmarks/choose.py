"""Choose bits on the demo: the table, the advice and the picture of docs/choose.md, from the cells of seeds.py.

python benchmarks/choose.py advise docs/seeds docs/seeds/schemes --memory 200MB
python benchmarks/choose.py picture docs/choose.svg docs/seeds docs/seeds/schemes
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from seeds import GROUPS, METRIC, read_run

from qvlm_plugin.atomic import write_file
from qvlm_plugin.commands.shared import parse_size
from qvlm_plugin.report.advice import Choice, advice, choices_grid, find_choices, notes
from qvlm_plugin.report.figures import Panel, Series, panels_figure
from qvlm_plugin.report.samples import RunSamples

METHODS = (*GROUPS["main"], "qvlm_rotated-groups")
"""Rows to choose from. Others, such as the steps of the ladder, are there to explain these."""

SAMPLES = "64"
"""Calibration samples of the cells that the picture shows."""


def read_choices(folders: Sequence[Path]) -> list[Choice]:
    """The choices of all folders by packed size; each folder has full precision on its own documents."""
    found: list[Choice] = []
    for folder in folders:
        names = sorted(file.stem for file in folder.glob("*.json") if file.stem != "documents")
        runs = [_with_facts(read_run(folder, name), name) for name in names]
        choices, _ = find_choices([run for run in runs if run.run["method"] in ("none", *METHODS)], METRIC)
        found += choices
    return sorted(found, key=lambda choice: choice.packed_bytes or math.inf)


def _with_facts(run: RunSamples, name: str) -> RunSamples:
    """A cell with its row's name as method, and with facts that the harness would have recorded."""
    facts = dict(run.run)
    if facts["method"] != "none":
        facts["method"] = name.removesuffix(f"-{facts['scheme']}-{'-'.join(name.split('-')[-2:])}")
    facts["options"] = {}  # the name implies them; cells of later versions record more
    facts |= {"pretrained": "demo", "backend": "reference"}
    return replace(run, run=facts)


def picture(choices: Sequence[Choice]) -> bytes:
    """Difference from full precision against packed size, as SVG."""
    shown = [choice for choice in choices if choice.calibration.endswith(f":{SAMPLES}")]
    series = []
    for method in dict.fromkeys(choice.method for choice in shown):
        own = sorted((choice for choice in shown if choice.method == method), key=lambda choice: choice.scheme)
        schemes = [choice.scheme.upper() for choice in own]
        series.append(
            Series(
                method if len(own) > 1 else f"{method} {schemes[0]}",
                [choice.packed_bytes / 1e6 for choice in own],
                [100 * choice.pooled.difference.value for choice in own],
                [50 * (choice.pooled.difference.high - choice.pooled.difference.low) for choice in own],
                labels=schemes if len(own) > 1 else None,
            )
        )
    panel = Panel(
        "packed size of the weights (MB)", "exact match − full precision (points)", tuple(series), joined=False
    )
    return panels_figure([[panel]], height=3.4)["svg"]


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("picture").add_argument("file", type=Path, help="SVG file to write")
    commands.add_parser("advise")
    for name in ("advise", "picture"):
        commands.choices[name].add_argument("folders", type=Path, nargs="+", help="output folders of seeds.py")
    commands.choices["advise"].add_argument(
        "--memory", type=lambda text: parse_size(text, "--memory"), help="largest size of the weights, such as 200MB"
    )
    commands.choices["advise"].add_argument(
        "--tolerance", type=float, default=1.0, help="largest accepted drop, in points; default: 1"
    )
    arguments = parser.parse_args()
    choices = read_choices(arguments.folders)
    if arguments.command == "picture":
        write_file(arguments.file, picture(choices))
        return
    sentences = [*advice(choices, arguments.memory, arguments.tolerance), *notes(choices)]
    print(choices_grid(choices, arguments.tolerance).markdown())
    print("\n" + "\n".join(f"- {sentence}" for sentence in sentences))


if __name__ == "__main__":
    main()
