"""Our methods and llm-compressor's on the demo's decoder: errors on the domain of the calibration set and outside it.

Only the decoder is rounded: its weights in groups of 64 (at W8A8 per output channel, at W4A4 as the method has it), its
activations per token (those of qlora and rtn per channel). All rows are measured on the same samples, to which none was
fitted: the error of what decoder layers add to their full-precision inputs, the divergence at the answers' tokens, and
the divergence at every token of English text that has nothing to do with pictures (Python's language reference, which
comes with Python).

The peers run in a separate environment, on the samples that the first command writes:

python benchmarks/peers.py samples peers                     # in a folder with the stand-in data (`qvlm demo data .`)
uv venv peers-env && uv pip install --python peers-env/bin/python llmcompressor==0.14.0.1
peers-env/bin/python benchmarks/peers.py peer peers "$(qvlm demo build | tail -1)"   # each row in turn
python benchmarks/peers.py table peers                       # fits ours, measures all; resumes
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_HERE = str(Path(__file__).parent)

Row = tuple[str, str]
"""Method and scheme."""

PEERS: tuple[Row, ...] = (
    ("gptq", "w4a16"), ("awq", "w4a16"), ("gptq", "w3a16"), ("awq", "w3a16"), ("smoothquant+gptq", "w8a8"),
)  # fmt: skip
"""The rows of llm-compressor."""

G64 = {"group_size": 64}
WEIGHTS_ALONE = (
    ("rtn", "rtn", G64), ("awq", "awq", G64), ("awq, duo scaling", "awq", G64 | {"duo_scaling": True}),
    ("awq, weight_clip=mse", "awq", G64 | {"weight_clip": "mse"}), ("mbq", "mbq", G64), ("gptq", "gptq", G64),
    ("gptq, clipped", "gptq", G64 | {"weight_clip": "mse"}), ("gptq, damping 0.1", "gptq", G64 | {"damping": 0.1}),
    ("qvlm_rotated", "qvlm_rotated", {"cdm": False}),
)  # fmt: skip
OURS: dict[str, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    "w4a16": WEIGHTS_ALONE,
    "w3a16": WEIGHTS_ALONE,
    "w4a4": (
        ("qlora", "qlora", {}), ("gptq", "gptq", G64), ("quarot", "quarot", {}),
        ("qvlm_rotated, centers and biases", "qvlm_rotated", {"cdm": False, "center": True, "bias_correction": True}),
        ("qvlm_rotated, correction=0.25", "qvlm_rotated", {"cdm": False, "correction": 0.25}),
        ("qvlm_rotated", "qvlm_rotated", {"cdm": False}),
    ),
    "w8a8": (
        ("rtn, per channel", "rtn", {"group_size": -1}), ("smoothquant", "smoothquant", {}),
        ("smoothquant, gptq", "smoothquant", {"rounding": "gptq"}),
        ("qvlm_rotated", "qvlm_rotated", {"cdm": False, "group_size": -1}),
    ),
}  # fmt: skip
"""Name, method and options of our rows, by scheme."""

SAMPLES, HELD_OUT, TEXTS, TEXT_TOKENS = 32, 96, 12, 128


Call = tuple[int, tuple[Any, ...], dict[str, Any], Tensor]
"""A call of a decoder layer: its index, positional and keyword arguments, and output."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs on which all rows are measured.

    Attributes:
        samples: encoded samples, one to a batch, and bool [1, T], true where an answer token is predicted.
        texts: token ids, int64 [texts, tokens].
        questions: documents to answer.
    """

    samples: Sequence[tuple[Mapping[str, Tensor], Tensor]]
    texts: Tensor
    questions: Sequence[Any]


@dataclass(frozen=True, eq=False)
class Reference:
    """The outputs of the full-precision model.

    Attributes:
        inputs: the inputs of all rows.
        given: the decoder's keyword arguments on each sample; no row changes what comes before the decoder.
        calls: every call of a decoder layer on the samples.
        answers: logits at the tokens of each sample's answer, [N, V].
        prose: logits at all tokens of the texts, [texts, tokens, V].
    """

    inputs: Inputs
    given: Sequence[dict[str, Any]]
    calls: Sequence[Call]
    answers: Sequence[Tensor]
    prose: Tensor


def write_samples(folder: Path) -> None:
    """Write the encoded calibration samples of all methods: the first draw of the stand-in train samples."""
    tensors = {}
    for index, (inputs, _) in enumerate(_drawn(SAMPLES, 0).batches(_full_precision().processor, 1)):
        tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in inputs.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "samples.safetensors")


def _drawn(count: int, seed: int) -> Any:
    """Stand-in train samples; those of seed 0 are the calibration set of all methods, except for our other draws."""
    from qvlm_plugin.calibration import read_calibration
    from qvlm_plugin.demo import CALIBRATION
    from qvlm_plugin.harness.task_source import draw_samples

    return read_calibration(f"{CALIBRATION}:{count}", None, seed, draw_samples)


def _held_out() -> Any:
    """The samples on which rows are measured."""
    return _drawn(HELD_OUT + SAMPLES, 1).without(set(_drawn(SAMPLES, 0).digests()))[:HELD_OUT]


def _calibration(draw: int) -> Any:
    """The calibration set of a draw; draws other than 0 leave out what rows are measured on."""
    from qvlm_plugin.calibration import CalibrationSet

    if draw == 0:
        return _drawn(SAMPLES, 0)
    drawn = _drawn(HELD_OUT + SAMPLES, draw)
    apart = drawn.without(set(CalibrationSet(_held_out()).digests()))
    return CalibrationSet(apart[:SAMPLES], drawn.source, draw)


def _full_precision() -> Any:
    """The demo model, freshly loaded."""
    from qvlm_plugin.demo import resolve_demo
    from qvlm_plugin.models.loading import load

    return load(resolve_demo("demo"), dtype="float32")


# The peers' side, in an environment without this package.


def run_peers(folder: Path, checkpoint: str) -> None:
    """Quantize the decoder by each of `PEERS`, and save its dequantized weights and the time."""
    sys.path.remove(_HERE)  # transformers would import the benchmark `kernels` instead of the package `kernels`
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = lambda self, *_: self  # llm-compressor pins memory even without a GPU
    tensors = load_file(folder / "samples.safetensors")
    count = 1 + max(int(name.partition(".")[0]) for name in tensors)
    samples = [
        {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{index}.")}
        for index in range(count)
    ]
    for method, scheme in PEERS:
        file = folder / f"{method}-{scheme}.safetensors"
        if file.exists():
            continue
        model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        start = time.process_time()
        oneshot(
            model=model,
            processor=AutoProcessor.from_pretrained(checkpoint),
            dataset=DataLoader(samples, batch_size=1, collate_fn=lambda batch: batch[0]),
            recipe=_recipe(method, scheme),
        )
        seconds = time.process_time() - start
        save_file(_rounded(model), file, {"seconds": str(seconds)})


def _recipe(method: str, scheme: str) -> list[Any]:
    """llm-compressor's modifiers with their defaults; 4- and 3-bit weights are asymmetric, as ours are."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.modifiers.smoothquant import SmoothQuantModifier

    bits = int(scheme[1])
    if scheme == "w8a8":
        weights = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
        inputs = QuantizationArgs(num_bits=8, strategy="token", symmetric=True, dynamic=True)
    else:
        weights, inputs = QuantizationArgs(num_bits=bits, strategy="group", group_size=64, symmetric=False), None
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)}
    given = {"config_groups": groups, "ignore": ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]}
    if method == "awq":
        return [AWQModifier(**given)]
    smoothing = [SmoothQuantModifier(smoothing_strength=0.5)] if method.startswith("smoothquant") else []
    return [*smoothing, GPTQModifier(**given)]


def _rounded(model: nn.Module) -> dict[str, Tensor]:
    """The decoder's parameters, with quantized weights dequantized."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    found = {}
    for name, module in model.model.language_model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            value = parameter.detach()
            scheme = getattr(module, "quantization_scheme", None)
            if own == "weight" and scheme is not None and scheme.weights is not None:
                value = fake_quantize(
                    value, module.weight_scale, getattr(module, "weight_zero_point", None), scheme.weights
                )
            if not own.startswith(("weight_", "input_", "output_")):
                found[f"{name}.{own}"] = value.float().contiguous().clone()
    return found


# Our side: fit our methods, and measure all rows.


def table(folder: Path, limit: int, schemes: Sequence[str], draws: Sequence[int] = (0,), only: str = "") -> None:
    """Measure all available rows and print them; rows that an earlier call measured are read from the folder.

    Args:
        folder: folder of the samples, the peers' weights and the measured rows.
        limit: documents of each task.
        schemes: schemes of the rows.
        draws: draws of calibration samples for our rows; the peers have draw 0.
        only: shows only rows whose name contains this text.
    """
    from qvlm_plugin.atomic import write_file
    from qvlm_plugin.reading import read_json
    from qvlm_plugin.report.results import Grid

    todo: dict[str, Callable[[Reference], dict[str, Any]]] = {}
    for scheme in schemes:
        for (name, method, options), draw in product(OURS[scheme], draws):
            label = f"{scheme} {name} (ours)" + (f", draw {draw}" if draw else "")
            todo[label] = partial(_ours, method, scheme, options, draw)
        for method, named in PEERS:
            file = folder / f"{method}-{scheme}.safetensors"
            if named == scheme and file.exists():
                todo[f"{scheme} {method}, llm-compressor"] = partial(_theirs, file, scheme)
    todo = {name: measure for name, measure in todo.items() if only in name}
    kept = folder / f"rows-{limit}.json"
    found = read_json(kept) if kept.exists() else {}
    missing = [name for name in todo if name not in found]
    reference = reference_of(*_subject(limit)) if missing else None
    for name in missing:
        found[name] = todo[name](reference)
        write_file(kept, json.dumps(found, indent=1).encode())
    header = ("scheme", "method", "layer error", "KL", "KL off-domain", "correct", "CPU s")
    rows = [
        (*name.split(" ", 1), *(_digits(found[name][key]) for key in ("layer_error", "kl", "kl_off_domain")),
         " / ".join(f"{100 * share:.1f}" for share in found[name]["correct"]), f"{found[name]['seconds']:.0f}")
        for name in todo
    ]  # fmt: skip
    print(Grid(header, tuple(rows)).markdown())


def _digits(error: float) -> str:
    return f"{error:.4f}" if error >= 1e-3 else f"{error:.1e}"


def _ours(method: str, scheme: str, options: Mapping[str, Any], draw: int, reference: Reference) -> dict[str, Any]:
    from qvlm_plugin import planning
    from qvlm_plugin.plan_request import check_request

    loaded = _full_precision()
    request = check_request(method, f"{scheme}+vision:w16a16+projector:w16a16", dict(options))
    start = time.process_time()
    plan = planning.obtain_plan(loaded, request, _calibration(draw), None)
    seconds = time.process_time() - start
    planning.apply(plan, loaded)
    return measured(loaded.model, reference) | {"seconds": seconds}


def _theirs(file: Path, scheme: str, reference: Reference) -> dict[str, Any]:
    from safetensors import safe_open

    model = _full_precision().model
    with safe_open(file, "pt") as stored:
        seconds = float(stored.metadata()["seconds"])
    decoder = model.model.language_model
    decoder.load_state_dict(load_file(file), strict=True)
    for module in decoder.modules() if scheme == "w8a8" else ():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given: (_symmetric(given[0]),))
    return measured(model, reference) | {"seconds": seconds}


def _symmetric(x: Tensor) -> Tensor:
    """x [..., C] rounded to 8 bits with one scale per token, as llm-compressor's W8A8 rounds inputs."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


def _subject(limit: int) -> tuple[nn.Module, Inputs]:
    """The model in full precision, and the inputs of the measurement."""
    from teacher_forced import read_questions

    from qvlm_plugin.calibration import CalibrationSet
    from qvlm_plugin.demo import TASKS
    from qvlm_plugin.methods.hidden import predicting

    loaded = _full_precision()
    batches = CalibrationSet(_held_out()).batches(loaded.processor, 1)
    samples = [(inputs, predicting(answer)) for inputs, answer in batches]
    prose = " ".join(topics.topics[name] for name in sorted(topics.topics))
    ids = loaded.processor.tokenizer(prose[:200_000], return_tensors="pt")["input_ids"][0]
    stride = len(ids) // TEXTS
    texts = torch.stack([ids[index * stride : index * stride + TEXT_TOKENS] for index in range(TEXTS)])
    return loaded.model, Inputs(samples, texts, read_questions(loaded, TASKS, limit))


@torch.inference_mode()
def reference_of(model: nn.Module, inputs: Inputs) -> Reference:
    """Run the full-precision model on the inputs."""
    given: list[dict[str, Any]] = []
    decoder = model.model.language_model
    hook = decoder.register_forward_pre_hook(lambda _, __, named: given.append(dict(named)), with_kwargs=True)
    with _recorded(model) as calls:
        hidden = [model.model(**sample, use_cache=False).last_hidden_state for sample, _ in inputs.samples]
    hook.remove()
    answers = _answers(model, inputs, hidden)
    return Reference(inputs, given, calls, answers, model(input_ids=inputs.texts).logits)


@torch.inference_mode()
def measured(model: nn.Module, reference: Reference) -> dict[str, Any]:
    """Errors of a quantized model: of its layers, its answers, and other text; and its share of exact answers."""
    from teacher_forced import exact_matches

    from qvlm_plugin.demo import TASKS

    inputs = reference.inputs
    hidden = (model.model.language_model(**item).last_hidden_state for item in reference.given)
    answers = _answers(model, inputs, hidden)
    exact = exact_matches(model, inputs.questions)
    by_task = {task: [exact[item.task, item.id] for item in inputs.questions if item.task == task] for task in TASKS}
    divergences = [_divergence(*pair) for pair in zip(reference.answers, answers, strict=True)]
    return {
        "layer_error": _layer_error(model, reference.calls),
        "kl": float(torch.stack(divergences).mean()),
        "kl_off_domain": float(_divergence(reference.prose, model(input_ids=inputs.texts).logits)),
        "correct": [sum(found) / len(found) for found in by_task.values() if found],
    }


def _answers(model: nn.Module, inputs: Inputs, hidden: Iterable[Tensor]) -> list[Tensor]:
    """Logits at the tokens of each sample's answer, [N, V], from the decoder's outputs."""
    return [model.lm_head(states[answer]) for states, (_, answer) in zip(hidden, inputs.samples, strict=True)]


def _divergence(target: Tensor, found: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence from ``target`` [..., V] in nats."""
    own, other = target.log_softmax(dim=-1), found.log_softmax(dim=-1)
    return (own.exp() * (own - other)).sum(dim=-1).mean()


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[Call]]:
    """While active, record every call of a decoder layer."""
    calls: list[Call] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, given, named, output, index=index: calls.append((index, given, dict(named), output)),
            with_kwargs=True,
        )
        for index, layer in enumerate(model.model.language_model.layers)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _layer_error(model: nn.Module, calls: Sequence[Call]) -> float:
    """Relative squared error of what layers add to the full-precision hidden states; mean over tokens and layers."""
    layers, errors = model.model.language_model.layers, []
    for index, given, named, output in calls:
        hidden = given[0] if given else named["hidden_states"]
        found, expected = (_tensor(written) - hidden for written in (layers[index](*given, **named), output))
        distance, norm = ((found - expected).square().sum(dim=-1), expected.square().sum(dim=-1))
        errors.append((distance / norm).mean())
    return float(torch.stack(errors).mean())


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("samples", "peer", "table"):
        commands.add_parser(name).add_argument("folder", type=Path, help="folder of samples, models and rows")
    commands.choices["peer"].add_argument("checkpoint", help="folder of the demo model")
    shown = commands.choices["table"]
    shown.add_argument("--limit", type=int, default=200, help="documents of each task; 0: none")
    shown.add_argument("--schemes", type=lambda text: text.split(","), default=[*OURS], help="separated by commas")
    shown.add_argument(
        "--draws",
        type=lambda text: [*map(int, text.split(","))],
        default=[0],
        help="seeds of calibration samples for this package's rows, separated by commas",
    )
    shown.add_argument("--only", default="", help="show only rows whose name contains this text")
    arguments = parser.parse_args()
    if arguments.command == "samples":
        write_samples(arguments.folder)
    elif arguments.command == "peer":
        run_peers(arguments.folder, arguments.checkpoint)
    else:
        table(arguments.folder, arguments.limit, arguments.schemes, arguments.draws, arguments.only)


if __name__ == "__main__":
    main()
