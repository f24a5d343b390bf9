"""Time of searches per decoder layer: the joint search of blocks against the layer-wise search, and each method.

Decoder layers have real sizes and random weights, and run on random samples of 600 tokens. The steps are the methods'
own. The joint search (`qvlm_plugin.methods.qvlm.mining`) has the paper's five percentiles, and its time includes the
dependencies and the forward passes between blocks; all layers are one block, which the paper limits to three. A
method's time is that of its whole search, including tower and projector at full size and one epoch of training, divided
by the number of layers. On a GPU the peak memory is measured, too.

python benchmarks/search.py                                     # two layers of 7B
python benchmarks/search.py --device cuda --samples 64 --layers 3 --json search.json
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
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
from qvlm_plugin.methods.hidden import block_inputs
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.methods.qvlm.mining import mine
from qvlm_plugin.methods.run import fit
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.scheme import Scheme

SEARCHES = {
    "layer-wise": MethodOptions(calibration_batch_size=1, max_depth=1),
    "joint, beam 2": MethodOptions(calibration_batch_size=1, h0=0, beam=2),
    "joint, exact": MethodOptions(calibration_batch_size=1, h0=0),
}


METHODS = ("rtn", "qlora", "awq", "qvlm", "qvlm_jacobian", "qvlm_rotated")


@dataclass(frozen=True)
class RandomSample:
    """A random question about a random image; the last four tokens are the answer."""

    inputs: BatchFeature
    answer: str = "four tokens"
    images: tuple[None, ...] = (None,)

    @property
    def conversation(self) -> "RandomSample":
        """The object with the attribute ``images``, as in `Sample`."""
        return self


@dataclass(frozen=True)
class RandomSamples:
    """A substitute for a calibration set, with one sample to a batch."""

    samples: tuple[RandomSample, ...]
    source: str = "random"
    seed: int = 0

    def batches(self, processor: ProcessorMixin, batch_size: int) -> Iterator[tuple[BatchFeature, Tensor]]:
        """Batches as those of `CalibrationSet.batches`."""
        for sample in self.samples:
            answer = torch.zeros_like(sample.inputs["input_ids"], dtype=torch.bool)
            answer[:, -4:] = True
            yield sample.inputs, answer

    def digests(self) -> tuple[str, ...]:
        """No digests: the samples are not documents."""
        return ()


def measure(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each search and method."""
    layers = arguments.layers
    model = random_model(config_of(arguments.layout, layers)).to(device)
    loaded = LoadedModel(model, None, "random weights", "")
    topology = plugins.topology(model.config)
    plan = make_plan(model, "", Variant(scheme="w4a4"))
    samples = RandomSamples(
        tuple(RandomSample(request(model.config, arguments.tokens, seed)) for seed in range(arguments.samples))
    )
    context = SearchContext(loaded, topology, Scheme.parse("w4a4"), MethodOptions(calibration_batch_size=1), samples)
    hidden = block_inputs(context)

    def search(options: MethodOptions) -> None:
        options = options.model_copy(update={"max_depth": min(options.max_depth, layers)})
        mine(replace(context, options=options), plan, hidden, hidden)

    def whole(name: str) -> None:
        method = plugins.method(name)
        fit(method, replace(context, options=method.options(calibration_batch_size=1, veo_epochs=1), method=name))

    runs = {name: partial(search, options) for name, options in SEARCHES.items()}
    runs |= {name: partial(whole, name) for name in arguments.methods.split(",") if name}
    times = time_in_turns(runs, arguments.rounds, device)
    return [
        {
            "search": name,
            "seconds_per_layer": times[name].median / layers,
            "spread": times[name].spread,
            "times_as_long_as_layer_wise": 1 / times[name].faster_than(times["layer-wise"]),
            "peak_bytes": _peak_bytes(run, device),
        }
        for name, run in runs.items()
    ]


def _peak_bytes(run: Callable[[], None], device: torch.device) -> int | None:
    """The peak memory of a run on a GPU; None on other devices."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="llava-1.5-7b", help="sizes of the model")
    parser.add_argument("--layers", type=int, default=2, help="number of decoder layers")
    parser.add_argument("--samples", type=int, default=1, help="number of calibration samples; the paper uses 64")
    parser.add_argument("--tokens", type=int, default=600, help="tokens of a sample")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each search")
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="methods whose whole search is timed, separated by commas"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = measure(arguments, device)
    given = {
        "layout": arguments.layout,
        "layers": arguments.layers,
        "samples": arguments.samples,
        "tokens": arguments.tokens,
    }
    given["machine"] = machine(device)
    title = (
        f"{arguments.layout}, {arguments.samples} x {arguments.tokens} tokens, {arguments.layers} layers; "
        f"{given['machine']}"
    )
    cells = [
        (
            row["search"],
            f"{row['seconds_per_layer']:.2f} ±{100 * row['spread']:.0f} %",
            f"{row['times_as_long_as_layer_wise']:.2f}",
            f"{row['peak_bytes'] / 1e9:.1f}" if row["peak_bytes"] else "",
        )
        for row in rows
    ]
    show(title, ["search", "s per layer", "x layer-wise", "peak GB"], cells)
    write_rows(arguments.json, [{**given, **row} for row in rows])


if __name__ == "__main__":
    main()
