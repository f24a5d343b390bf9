"""How much could a joint search gain? An oracle chooses each layer's percentile by the loss of the answers.

Eq. 3 minimises the distance of a block's output from full precision. The oracle chooses, layer by layer from the bottom
up, the percentile with which the whole quantized model has the least loss on the answers of stand-in train samples, to
which no plan was fitted. Its gain on unseen documents estimates what any choice among these percentiles can gain on
this model, as far as a layer-wise search finds it.

python benchmarks/oracle.py oracle.json seeds-results/plans/qvlm_rotated-cdm-w4a4-64-0 \\
    seeds-results/plans/qvlm_rotated-w4a4-64-0

The oracle starts from the first plan, of a method with or without a search; the others are compared with it. Run it in
a folder with the stand-in data (`qvlm demo data .`). It takes an hour and more; each layer's percentile and each
measurement is kept in the file, from which the same command resumes.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from teacher_forced import Question, exact_matches, read_questions
from torch import Tensor, nn
from tqdm import tqdm

from qvlm_plugin import planning, plugins
from qvlm_plugin.atomic import write_file
from qvlm_plugin.calibration import CalibrationSet, read_calibration
from qvlm_plugin.demo import CALIBRATION, TASKS, resolve_demo
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.task_source import draw_samples
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.hidden import HiddenCache, block_inputs
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.models.loading import LoadedModel, load
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.reading import read_json
from qvlm_plugin.report.results import Grid
from qvlm_plugin.scheme import Scheme

SEED = 1000
"""Seed of the oracle's samples, other than that of any plan; samples to which a plan was fitted are left out."""

BATCH = MethodOptions().calibration_batch_size
FULL_PRECISION = "full precision"


@dataclass(frozen=True)
class Answers:
    """The tokens of the answers.

    Attributes:
        loaded: the model, quantized or not.
        ids: the tokens of each batch's answers, int64 [N], in the order of `Batch.answer`.
    """

    loaded: LoadedModel
    ids: Sequence[Tensor]

    @torch.no_grad()
    def loss(self, hidden: HiddenCache) -> float:
        """Mean cross-entropy of the answers' tokens, from the outputs of the decoder's last layer."""
        model, total, count = self.loaded.model, 0.0, 0
        for states, batch, ids in zip(hidden.states, hidden.batches, self.ids, strict=True):
            logits = model.lm_head(model.model.language_model.norm(states)[batch.answer])
            total += float(torch.nn.functional.cross_entropy(logits.float(), ids, reduction="sum"))
            count += len(ids)
        return total / count


def context_of(loaded: LoadedModel, samples: CalibrationSet) -> SearchContext:
    """The context for hidden states of the samples."""
    topology = plugins.topology(loaded.model.config)
    return SearchContext(loaded, topology, Scheme.parse("w16a16"), MethodOptions(), samples)


def answers_of(loaded: LoadedModel, samples: CalibrationSet) -> Answers:
    """The answers of the samples, in the same batches as hidden states."""
    batches = samples.batches(loaded.processor, BATCH)
    return Answers(loaded, [inputs["input_ids"][answer] for inputs, answer in batches])


@torch.no_grad()
def choose(
    loaded: LoadedModel, samples: CalibrationSet, percentiles: Sequence[float], known: Sequence[float] = ()
) -> Iterator[float]:
    """Set each decoder layer of a quantized model to the percentile with the least loss of the answers.

    Args:
        loaded: a model quantized by the reference arithmetic with per-token ranges; its clip ratios are changed.
        samples: samples with answers.
        percentiles: factors of the ranges, widest first; of equally good ones the widest is kept.
        known: the percentiles of the first layers, from an earlier call.

    Yields:
        The percentile of each layer, when the layer has been set to it.
    """
    context, answers, least = context_of(loaded, samples), answers_of(loaded, samples), None
    hidden = block_inputs(context)
    for index, (name, layer) in enumerate(tqdm(context.layers, "oracle")):
        ratios = {
            id(module.clip_ratio): module.clip_ratio for module in layer.modules() if isinstance(module, QuantLinear)
        }
        whole = {key: ratio.clone() for key, ratio in ratios.items()}
        if index < len(known):
            best = known[index]
        else:
            # With the layer as it is, the loss is the least of the layer below.
            losses = {1.0: answers.loss(_through(hidden, context.layers[index:])) if least is None else least}
            for percentile in percentiles:
                if percentile not in losses:
                    for key, ratio in ratios.items():
                        ratio.copy_(whole[key] * percentile)
                    losses[percentile] = answers.loss(_through(hidden, context.layers[index:]))
            best = min(percentiles, key=losses.__getitem__)
            least = losses[best]
        for key, ratio in ratios.items():
            ratio.copy_(whole[key] * best)
        yield best
        hidden = hidden.through(name, layer)


def _through(hidden: HiddenCache, layers: Sequence[tuple[str, nn.Module]]) -> HiddenCache:
    for named in layers:
        hidden = hidden.through(*named)
    return hidden


@torch.no_grad()
def measured(loaded: LoadedModel, samples: CalibrationSet, questions: Sequence[Question]) -> tuple[str, str]:
    """The loss of the answers of the oracle's samples, and the share of documents answered exactly."""
    context = context_of(loaded, samples)
    loss = answers_of(loaded, samples).loss(_through(block_inputs(context), context.layers))
    exact = exact_matches(loaded.model, questions)
    return f"{loss:.4f}", f"{100 * sum(exact.values()) / len(exact):.1f}"


@dataclass(frozen=True)
class Kept:
    """What is known so far of a run, in a file.

    Attributes:
        file: the file.
        asked: the arguments of the run, as JSON data.
        rows: for each row of the table, the loss of the answers and the share of exact ones, as texts.
        chosen: the oracle's percentiles of the first layers.
    """

    file: Path
    asked: dict[str, Any]
    rows: dict[str, Sequence[str]] = field(default_factory=dict)
    chosen: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, file: Path, asked: dict[str, Any]) -> "Kept":
        """Read the file, if it exists.

        Raises:
            QVLMError: its arguments were others.
        """
        if not file.exists():
            return cls(file, asked)
        kept = cls(file, **read_json(file))
        if kept.asked != asked:
            raise QVLMError(f"{file}: written with other arguments; repeat them, or pass another file")
        return kept

    def write(self) -> None:
        """Write the file."""
        content = {"asked": self.asked, "rows": self.rows, "chosen": self.chosen}
        write_file(self.file, json.dumps(content, indent=1).encode())


def compare(kept: Kept, plans: Mapping[Path, RoundingPlan]) -> None:
    """Measure full precision, the plans, and the first plan with the oracle's percentiles; keep what is measured.

    Args:
        kept: what is known so far, to which the rest is added.
        plans: the plans, by their folders.
    """
    samples, fitted = kept.asked["samples"], {digest for plan in plans.values() for digest in plan.calibration.digests}
    drawn = read_calibration(f"{CALIBRATION}:{2 * samples}", None, SEED, draw_samples)
    loaded = load(resolve_demo("demo"), dtype="float32")
    given = CalibrationSet(drawn.without(fitted)[:samples]).encoded(loaded.processor, BATCH)
    questions = read_questions(loaded, TASKS, kept.asked["limit"])

    def measure(name: str, loaded: LoadedModel) -> None:
        kept.rows[name] = measured(loaded, given, questions)
        kept.write()

    def quantized(plan: RoundingPlan) -> LoadedModel:
        loaded = load(resolve_demo("demo"), dtype="float32")
        planning.apply(plan, loaded)
        return loaded

    if FULL_PRECISION not in kept.rows:
        measure(FULL_PRECISION, loaded)
    for path, plan in plans.items():
        if path.name not in kept.rows:
            measure(path.name, quantized(plan))
    first, plan = next(iter(plans.items()))
    if f"{first.name}, oracle" not in kept.rows:
        loaded = quantized(plan)
        for index, percentile in enumerate(choose(loaded, given, kept.asked["percentiles"], tuple(kept.chosen))):
            kept.chosen[index:] = [percentile]
            kept.write()
        measure(f"{first.name}, oracle", loaded)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON file that keeps what is known so far")
    parser.add_argument("plan", type=Path, help="plan from which the oracle starts")
    parser.add_argument("others", type=Path, nargs="*", help="plans to compare with")
    parser.add_argument(
        "--samples", type=int, default=64, help="number of train samples on which the oracle computes the loss"
    )
    parser.add_argument("--limit", type=int, default=600, help="documents of each task")
    parser.add_argument(
        "--percentiles",
        type=lambda text: [*map(float, text.split(","))],
        default=[1.0, 0.95, 0.9],
        help="percentiles to choose from, separated by commas",
    )
    arguments = parser.parse_args()
    plans = {path: RoundingPlan.load(path) for path in (arguments.plan, *arguments.others)}
    asked = {name: getattr(arguments, name) for name in ("samples", "limit", "percentiles")}
    asked["plans"] = {path.name: plan.facts["plan_hash"] for path, plan in plans.items()}
    kept = Kept.of(arguments.file, asked)
    compare(kept, plans)
    header = ("plan", f"loss of {arguments.samples} answers", "exact match (%)")
    print(Grid(header, tuple((name, *texts) for name, texts in kept.rows.items())).markdown())
    print(f"\nThe oracle's percentiles: {kept.chosen}")


if __name__ == "__main__":
    main()
