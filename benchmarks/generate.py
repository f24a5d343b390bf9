"""Memory and time of generation: a LLaVA in bfloat16 and with packed weights.

Every variant runs in its own process, which loads it (quantizing while weights are read) and measures its own memory;
all processes run at the same time and answer in turns. Weights are random and activation ranges arbitrary, which
changes the answers but not their cost. A request has 600 tokens, 576 of them an image.

python benchmarks/generate.py --layout llava-1.5-7b --layers 2
python benchmarks/generate.py --layout demo --prompt-tokens 90 --variants bf16,reference-w4a4,packed-w4a4
python benchmarks/generate.py --layout llava-1.5-13b --device cuda --compile --json generate.json
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from random_llava import LAYOUTS, config_of, request, write_checkpoint
from side_by_side import Times, machine, show, write_rows
from transformers import CompileConfig, LlavaForConditionalGeneration
from transformers.utils import logging

from qvlm_plugin import backends, plugins
from qvlm_plugin.memory import peak_memory
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft, build_plan
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.methods.rotate import rotate_inputs
from qvlm_plugin.models.loading import LoadedModel, load
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.quantized_loading import QuantizeOnLoad
from qvlm_plugin.scheme import Scheme


@dataclass(frozen=True)
class Variant:
    """One of the models to compare.

    Attributes:
        dtype: the compute type.
        scheme: scheme; None for full precision.
        backend: backend of a quantized model.
        options: options of the method, which decide formats and rotations.
    """

    dtype: str = "bfloat16"
    scheme: str | None = None
    backend: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)


NF = {"weights": "nf"}
ROTATED = {"activations": "token", "transform": "rotate", "group_size": 64, "group_scales": "progressive"}
"""The options of ``qvlm_rotated``, except for smoothing and searches, which do not change the cost, and for
``token_bounds=normal``, which also computes each token's standard deviation."""


VARIANTS = {
    "fp16": Variant("float16"),
    "bf16": Variant(),
    "packed-w4a4": Variant(scheme="w4a4"),
    "packed-w4a16": Variant(scheme="w4a16"),
    "packed-w8a8": Variant(scheme="w8a8"),
    "rotated-w4a4": Variant(scheme="w4a4", options=ROTATED),
    "rotated-w4a8": Variant(scheme="w4a8", options=ROTATED),
    "rotated-w8a8": Variant(scheme="w8a8", options=ROTATED),
    "nf4": Variant(scheme="w4a16", options=NF),
    "nf4a4": Variant(scheme="w4a4", options=NF),
    "reference-w4a4": Variant(scheme="w4a4", backend="reference"),
    "reference-w8a8": Variant(scheme="w8a8", backend="reference"),
    "reference-rotated-w4a4": Variant(scheme="w4a4", backend="reference", options=ROTATED),
    "fp32": Variant("float32"),
    "fp32-reference-rotated-w4a4": Variant("float32", "w4a4", "reference", ROTATED),
    "fp32-rotated-w4a4": Variant("float32", "w4a4", options=ROTATED),
}
DEFAULT = ("bf16", "packed-w4a4", "packed-w4a16", "packed-w8a8", "rotated-w4a4", "rotated-w4a8", "rotated-w8a8", "nf4")
"""The default variants; on a GPU ``fp16`` comes first."""


@dataclass(frozen=True)
class Setting:
    """The setting of all variants; ``layers`` is the number in the whole layout."""

    source: str
    device: str
    prompt_tokens: int
    batch_size: int
    compiled: bool
    layers: int


def make_plan(model: LlavaForConditionalGeneration, fingerprint: str, variant: Variant) -> RoundingPlan:
    """A plan with arbitrary ranges, for a model that may be on the meta device."""
    loaded = LoadedModel(model, None, "random weights", fingerprint)
    topology, scheme = plugins.topology(model.config), Scheme.parse(variant.scheme)
    options = MethodOptions(**variant.options)
    context = SearchContext(loaded, topology, scheme, options, method="rtn")
    tensors = {}
    for site, fmt in context.activation_sites.items():
        width = model.get_submodule(site.name).in_features
        values = {"lower": -4 * torch.ones(width), "upper": 4 * torch.ones(width), "clip_ratio": torch.ones(1)}
        tensors |= {f"{site.name}/{name}": values[name] for name in fmt.parameters}
    draft = Draft(tensors)
    return build_plan(context, rotate_inputs(context, draft) if "rotate" in options.transforms else draft)


def serve(connection: Connection, setting: Setting, variant: Variant, fingerprint: str | None) -> None:
    """Load a variant and send its facts; then, for each number received, generate as many tokens and send the time.

    A number of 0 ends the process.
    """
    logging.set_verbosity_error()
    device = torch.device(setting.device)
    quantize = None
    if variant.scheme:
        with torch.device("meta"):
            shape = LlavaForConditionalGeneration(config_from(setting.source))
        quantize = QuantizeOnLoad(make_plan(shape, fingerprint, variant), backends.kernels(variant.backend))
    before, start = peak_memory(device.type == "cuda"), time.perf_counter()
    loaded = load(setting.source, dtype=variant.dtype, device=device, quantize=quantize)
    seconds = time.perf_counter() - start
    model, layers = loaded.model, loaded.model.model.language_model.layers
    connection.send(
        {
            "fingerprint": loaded.fingerprint,
            "weight_bytes": (weight_bytes := _weight_bytes(model)),
            "weight_bytes_all_layers": weight_bytes + (setting.layers - len(layers)) * _weight_bytes(layers[-1]),
            "load_s": seconds,
            "memory_before_bytes": before,
            "load_peak_bytes": peak_memory(device.type == "cuda"),
            "kernels": quantize.execution.counts if quantize else {},
            "fallbacks": len(quantize.execution.fallbacks) if quantize else 0,
        }
    )
    inputs = request(model.config, setting.prompt_tokens, count=setting.batch_size).to(device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    options: dict[str, Any] = {"disable_compile": True}
    if setting.compiled:
        compile_config = CompileConfig()
        compile_config._compile_all_devices = True  # on a CPU too
        options = {"cache_implementation": "static", "compile_config": compile_config}
    while count := connection.recv():
        start = time.perf_counter()
        with torch.inference_mode():
            answer = model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)
        assert answer[0, -count:].numel() == count  # copying the answer waits for the device
        connection.send(time.perf_counter() - start)
    connection.send(peak_memory(device.type == "cuda"))


def config_from(source: str) -> Any:
    """The configuration of a checkpoint folder."""
    return LlavaForConditionalGeneration.config_class.from_pretrained(source)


def _weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; shared memory counts once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def measure(setting: Setting, names: list[str], answers: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Rows of all variants; the others are compared with the first."""
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    facts: dict[str, dict[str, Any]] = {}
    processes = []
    for name in names:
        ours, theirs = context.Pipe()
        fingerprint = facts[names[0]]["fingerprint"] if facts else None
        process = context.Process(target=serve, args=(theirs, setting, VARIANTS[name], fingerprint), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        connections[name], facts[name] = ours, ours.recv()
        print(f"{name} is loaded: {facts[name]['load_s']:.1f} s, {facts[name]['kernels'] or 'full precision'}")
    seconds: dict[tuple[str, int], list[float]] = {(name, count): [] for name in names for count in answers}
    for turn in range(rounds + 1):
        for name, count in seconds:
            connections[name].send(count)
            taken = connections[name].recv()
            if turn:  # the first turn warms up and compiles
                seconds[name, count].append(taken)
    for name, connection in connections.items():
        connection.send(0)
        facts[name]["peak_memory_bytes"] = connection.recv()
    for process in processes:
        process.join()
    times = {name: {count: Times(tuple(seconds[name, count])) for count in answers} for name in names}
    return [_row(name, facts, times, names[0]) for name in names]


def _row(
    name: str, facts: Mapping[str, Mapping[str, Any]], times: Mapping[str, Mapping[int, Times]], baseline: str
) -> dict[str, Any]:
    of_variant, own = facts[name], times[name]
    first, *_, last = own
    prefill = own[first]
    decode = Times(
        tuple(
            (long - short) / (last - first) for short, long in zip(own[first].samples, own[last].samples, strict=True)
        )
    )
    answers = {f"seconds_{count}_out": own[count].median for count in own if count > 1} | {
        f"times_as_fast_{count}_out": own[count].faster_than(times[baseline][count]) for count in own if count > 1
    }
    return {
        "variant": name,
        **{key: value for key, value in of_variant.items() if key != "fingerprint"},
        "weight_ratio": of_variant["weight_bytes"] / facts[baseline]["weight_bytes"],
        "weight_ratio_all_layers": of_variant["weight_bytes_all_layers"] / facts[baseline]["weight_bytes_all_layers"],
        "prefill_ms": 1e3 * prefill.median,
        "prefill_spread": prefill.spread,
        "decode_ms_per_token": 1e3 * decode.median,
        "decode_spread": decode.spread,
        **answers,
    }


def main() -> None:
    """Write a random checkpoint, measure, print and write the rows, delete the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="llava-1.5-7b", help="sizes of the model")
    parser.add_argument(
        "--layers", type=int, help="number of decoder layers; default: all, which needs the full model's memory"
    )
    parser.add_argument(
        "--variants",
        help=f"separated by commas: {', '.join(VARIANTS)}; the first one is the baseline, in full precision; "
        f"default: {', '.join(DEFAULT)}, with fp16 before them on a GPU",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--compile", action="store_true", help="compile the model, with a static cache; a CPU needs a C++ compiler"
    )
    parser.add_argument("--prompt-tokens", type=int, default=600, help="tokens of a prompt, image included")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts per request")
    parser.add_argument("--answers", default="16,128", help="lengths of answers in tokens, separated by commas")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant")
    parser.add_argument(
        "--folder", type=Path, help="folder for the random checkpoint; default: the folder for temporary files"
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    names = arguments.variants.split(",") if arguments.variants else ["fp16"] * (device.type == "cuda") + [*DEFAULT]
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"--variants: {', '.join(sorted(unknown))} is unknown; allowed are {', '.join(VARIANTS)}")
    if VARIANTS[names[0]].scheme:
        parser.error(f"--variants: {names[0]} is quantized; the first must be in full precision")
    answers = (1, *map(int, arguments.answers.split(",")))
    config = config_of(arguments.layout, arguments.layers)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_checkpoint(config, Path(folder))
        depth = config_of(arguments.layout).text_config.num_hidden_layers
        setting = Setting(
            folder, arguments.device, arguments.prompt_tokens, arguments.batch_size, arguments.compile, depth
        )
        found = measure(setting, names, answers, arguments.rounds)
    given = {
        "layout": arguments.layout,
        "layers": config.text_config.num_hidden_layers,
        "prompt_tokens": arguments.prompt_tokens,
        "batch_size": arguments.batch_size,
        "compiled": arguments.compile,
        "machine": machine(device),
    }
    title = f"{arguments.layout}, {given['layers']} decoder layers"
    title += f"{', compiled' if arguments.compile else ''}; {given['machine']}"
    lengths = answers[1:]
    columns = [
        "variant",
        "weights GB",
        "x",
        "all layers x",
        "load s",
        "+ GB",
        "peak + GB",
        "prefill ms",
        "ms per token",
    ]
    columns += [text for count in lengths for text in (f"{count} out s", "x as fast")]
    show(title, columns, [_cells(row, lengths) for row in found])
    write_rows(arguments.json, [{**given, **row} for row in found])


def _cells(row: Mapping[str, Any], lengths: tuple[int, ...]) -> list[str]:
    ends = [
        text
        for count in lengths
        for text in (f"{row[f'seconds_{count}_out']:.2f}", f"{row[f'times_as_fast_{count}_out']:.2f}")
    ]
    return [
        row["variant"],
        f"{row['weight_bytes'] / 1e9:.2f}",
        f"{row['weight_ratio']:.2f}",
        f"{row['weight_ratio_all_layers']:.2f}",
        f"{row['load_s']:.1f}",
        f"{(row['load_peak_bytes'] - row['memory_before_bytes']) / 1e9:.2f}",
        f"{(row['peak_memory_bytes'] - row['memory_before_bytes']) / 1e9:.2f}",
        f"{row['prefill_ms']:.0f} ±{100 * row['prefill_spread']:.0f} %",
        f"{row['decode_ms_per_token']:.1f} ±{100 * row['decode_spread']:.0f} %",
        *ends,
    ]


if __name__ == "__main__":
    main()
