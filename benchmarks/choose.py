"""Which bits to choose on the demo: the cells of seeds.py as the table, the advice and the picture of docs/choose.md.

python benchmarks/choose.py advise docs/seeds docs/seeds/schemes --memory 200MB
python benchmarks/choose.py picture docs/choose.svg docs/seeds docs/seeds/schemes
python benchmarks/choose.py parameters docs/seeds/parameters.json  # counts the demo's parameters, for packed sizes
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from seeds import METRIC, read_run

from qvlm_plugin.atomic import write_file
from qvlm_plugin.commands.advise import parse_memory
from qvlm_plugin.reading import read_json
from qvlm_plugin.report.advice import Choice, advice, choices_grid, find_choices, notes
from qvlm_plugin.report.figures import Panel, Series, panels_figure
from qvlm_plugin.report.samples import RunSamples

PARAMETERS = Path(__file__).parents[1] / "docs" / "seeds" / "parameters.json"
SAMPLES = "64"
"""Of the draws that the picture shows."""


def read_choices(folders: Sequence[Path]) -> list[Choice]:
    """Those of all folders by packed size; each folder has full precision on its own documents."""
    found: list[Choice] = []
    for folder in folders:
        names = sorted(file.stem for file in folder.glob("*.json") if file.stem not in ("documents", "parameters"))
        choices, _ = find_choices([_with_facts(read_run(folder, name), name) for name in names], METRIC)
        found += choices
    return sorted(found, key=lambda choice: choice.packed_bytes or math.inf)


def _with_facts(run: RunSamples, name: str) -> RunSamples:
    """A cell with its row's name as method, and with what the harness would have added."""
    facts = dict(run.run)
    if facts["method"] != "none":
        facts["method"] = name.removesuffix(f"-{facts['scheme']}-{'-'.join(name.split('-')[-2:])}")
    facts["options"] = {}  # the name says them; what later versions record in addition tells no rows apart
    facts |= {"pretrained": "demo", "backend": "reference", "packed_bytes": _packed_bytes(facts.get("bits", {}))}
    return replace(run, run=facts)


def _packed_bytes(bits: dict[str, dict[str, float]]) -> int:
    """Size of the demo's weights with these effective bits by part; all else in 16 bits."""
    counts = read_json(PARAMETERS)
    return round(sum(count * bits.get(part, {"weight": 16.0})["weight"] for part, count in counts.items()) / 8)


def count_parameters(file: Path) -> None:
    """Write how many weights of Linears each part of the demo has, and how many parameters there are beside them."""
    from qvlm_plugin.demo import resolve_demo
    from qvlm_plugin.models.loading import load
    from qvlm_plugin.plan_request import check_request
    from qvlm_plugin.planning import obtain_plan

    loaded = load(resolve_demo("demo"))
    plan = obtain_plan(loaded, check_request("rtn", "w4a16", {}), None, None)
    counts = Counter()
    for module in plan.modules:
        counts[module.part] += math.prod(module.shape)
    # The head, a Linear, is tied to the embeddings: parameters() gives the two once.
    counts["rest"] = sum(parameter.numel() for parameter in loaded.model.parameters()) - counts.total()
    write_file(file, (json.dumps(counts, indent=1) + "\n").encode())


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
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("picture", "parameters"):
        commands.add_parser(name).add_argument("file", type=Path)
    commands.add_parser("advise")
    for name in ("advise", "picture"):
        commands.choices[name].add_argument("folders", type=Path, nargs="+")
    commands.choices["advise"].add_argument("--memory", type=parse_memory)
    commands.choices["advise"].add_argument("--tolerance", type=float, default=1.0)
    asked = parser.parse_args()
    if asked.command == "parameters":
        count_parameters(asked.file)
        return
    choices = read_choices(asked.folders)
    if asked.command == "picture":
        write_file(asked.file, picture(choices))
        return
    sentences = [*advice(choices, asked.memory, asked.tolerance), *notes(choices)]
    print(choices_grid(choices, asked.tolerance).markdown())
    print("\n" + "\n".join(f"- {sentence}" for sentence in sentences))


if __name__ == "__main__":
    main()
