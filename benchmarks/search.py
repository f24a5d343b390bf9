"""How long the search of activation ranges takes for a decoder layer: one by one, and jointly over blocks of layers.

Decoder layers of real sizes with random weights; hidden states as random samples of 600 tokens make them. The steps are
the method's own (`qvlm_plugin.methods.qvlm.mining`), dependencies and the runs that carry hidden states on included,
with the paper's five percentiles. All layers are one block in the joint search, which the paper limits to three.

python benchmarks/search.py                                     # two layers of 7B
python benchmarks/search.py --device cuda --samples 64 --layers 3 --json search.json
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from generate import Variant, make_plan
from random_llava import LAYOUTS, config_of, random_model, request
from side_by_side import machine, show, time_in_turns, write_rows
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from qvlm_plugin import plugins
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.hidden import decoder_inputs
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.methods.qvlm.mining import mine
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.scheme import Scheme

SEARCHES = {
    "layer-wise": MethodOptions(calibration_batch_size=1, max_depth=1),
    "joint, beam 2": MethodOptions(calibration_batch_size=1, h0=0, beam=2),
    "joint, exact": MethodOptions(calibration_batch_size=1, h0=0),
}


class RandomSamples:
    """What stands in for a calibration set: one random question to a batch."""

    def __init__(self, loaded: LoadedModel, samples: int, tokens: int) -> None:
        """``samples`` questions of ``tokens`` tokens."""
        self.samples = self.requests = [request(loaded.model.config, tokens, seed) for seed in range(samples)]

    def batches(self, processor: ProcessorMixin, batch_size: int) -> Iterator[tuple[BatchFeature, Tensor]]:
        """As `CalibrationSet.batches`; the last four tokens are the answer."""
        for asked in self.requests:
            answer = torch.zeros_like(asked["input_ids"], dtype=torch.bool)
            answer[:, -4:] = True
            yield asked, answer


def measure(
    layout: str, layers: int, samples: int, tokens: int, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each search."""
    model = random_model(config_of(layout, layers)).to(device)
    loaded = LoadedModel(model, None, "random weights", "")
    topology = plugins.topology(model.config)
    plan = make_plan(model, "", Variant(scheme="w4a4"))
    samples = RandomSamples(loaded, samples, tokens)
    context = SearchContext(loaded, topology, Scheme.parse("w4a4"), MethodOptions(calibration_batch_size=1), samples)
    hidden = decoder_inputs(context)

    def search(options: MethodOptions) -> None:
        options = options.model_copy(update={"max_depth": min(options.max_depth, layers)})
        mine(replace(context, options=options), plan, hidden, hidden)

    runs = {name: lambda options=options: search(options) for name, options in SEARCHES.items()}
    times = time_in_turns(runs, rounds, device)
    return [
        {
            "search": name,
            "seconds_per_layer": times[name].median / layers,
            "spread": times[name].spread,
            "times_as_long_as_layer_wise": 1 / times[name].faster_than(times["layer-wise"]),
        }
        for name in SEARCHES
    ]


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1, help="of --tokens tokens; the paper calibrates on 64")
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    rows = measure(asked.layout, asked.layers, asked.samples, asked.tokens, asked.rounds, device)
    given = {"layout": asked.layout, "layers": asked.layers, "samples": asked.samples, "tokens": asked.tokens}
    given["machine"] = machine(device)
    title = f"{asked.layout}, {asked.samples} x {asked.tokens} tokens, {asked.layers} layers; {given['machine']}"
    cells = [
        (
            row["search"],
            f"{row['seconds_per_layer']:.2f} ±{100 * row['spread']:.0f} %",
            f"{row['times_as_long_as_layer_wise']:.2f}",
        )
        for row in rows
    ]
    show(title, ["search", "s per layer", "x layer-wise"], cells)
    write_rows(asked.json, [{**given, **row} for row in rows])


if __name__ == "__main__":
    main()
