"""How much could a joint search gain? An oracle chooses each layer's percentile by the loss of the answers.

Eq. 3 minimises the distance of a block's output from full precision. The oracle chooses, layer by layer from the bottom
up, the percentile with which the whole quantized model has the least loss on the answers of stand-in train samples, to
which no plan was fitted. Its gain on unseen documents estimates what any choice among these percentiles can gain on
this model, as far as a layer-wise search finds it.

python benchmarks/oracle.py seeds-results/plans/qvlm_rotated-cdm-w4a4-64-0 seeds-results/plans/qvlm_rotated-w4a4-64-0

The first plan is that of a method without its joint search, from which the oracle starts; the others are compared with
it. Run it in a folder with the stand-in data (`qvlm demo data .`).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from teacher_forced import Question, exact_matches, read_questions
from torch import Tensor, nn
from tqdm import tqdm

from qvlm_plugin import planning, plugins
from qvlm_plugin.calibration import CalibrationSet, read_calibration
from qvlm_plugin.demo import CALIBRATION, TASKS, resolve_demo
from qvlm_plugin.harness.task_source import draw_samples
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.hidden import HiddenCache, block_inputs
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.models.loading import LoadedModel, load
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.report.results import Grid
from qvlm_plugin.scheme import Scheme

SEED = 1000
"""Seed of the oracle's samples, other than that of any plan; samples to which a plan was fitted are left out."""

BATCH = MethodOptions().calibration_batch_size


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
def choose(loaded: LoadedModel, samples: CalibrationSet, percentiles: Sequence[float]) -> list[float]:
    """Set each decoder layer of a quantized model to the percentile with the least loss of the answers.

    Args:
        loaded: a model quantized by the reference arithmetic with per-token ranges; its clip ratios are changed.
        samples: samples with answers.
        percentiles: factors of the ranges, widest first; of equally good ones the widest is kept.

    Returns:
        The percentile of each layer.
    """
    context, answers, chosen = context_of(loaded, samples), answers_of(loaded, samples), []
    hidden = block_inputs(context)
    least = answers.loss(_through(hidden, context.layers))
    for index, (name, layer) in enumerate(tqdm(context.layers, "oracle")):
        ratios = {
            id(module.clip_ratio): module.clip_ratio for module in layer.modules() if isinstance(module, QuantLinear)
        }
        whole = {key: ratio.clone() for key, ratio in ratios.items()}
        losses = {1.0: least}  # with the layer as it is, and those below as they were chosen
        for percentile in percentiles:
            if percentile not in losses:
                for key, ratio in ratios.items():
                    ratio.copy_(whole[key] * percentile)
                losses[percentile] = answers.loss(_through(hidden, context.layers[index:]))
        best = min(percentiles, key=losses.__getitem__)
        least = losses[best]
        for key, ratio in ratios.items():
            ratio.copy_(whole[key] * best)
        chosen.append(best)
        hidden = hidden.through(name, layer)
    return chosen


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    fitted = {digest for plan in plans.values() for digest in plan.calibration.digests}
    drawn = read_calibration(f"{CALIBRATION}:{2 * arguments.samples}", None, SEED, draw_samples)
    loaded = load(resolve_demo("demo"), dtype="float32")
    samples = CalibrationSet(drawn.without(fitted)[: arguments.samples]).encoded(loaded.processor, BATCH)
    questions = read_questions(loaded, TASKS, arguments.limit)
    rows = [("full precision", *measured(loaded, samples, questions))]
    for path, plan in plans.items():
        loaded = load(resolve_demo("demo"), dtype="float32")
        planning.apply(plan, loaded)
        rows.append((path.name, *measured(loaded, samples, questions)))
    loaded = load(resolve_demo("demo"), dtype="float32")
    planning.apply(plans[arguments.plan], loaded)
    chosen = choose(loaded, samples, arguments.percentiles)
    rows.append((f"{arguments.plan.name}, oracle", *measured(loaded, samples, questions)))
    print(
        Grid(
            ("plan", f"loss of the oracle's {len(samples.samples)} answers", "exact match (%)"), tuple(rows)
        ).markdown()
    )
    print(f"\nThe oracle's percentiles: {chosen}")


if __name__ == "__main__":
    main()
