"""Sources of the quantization error: layers, Linears and tokens.

Each static site of the decoder is rounded separately, and each element's squared error is weighted by (∂m/∂x)² for
the log-odds m of the answer's tokens (`qvlm_plugin.methods.importance`). To second order and for independent errors,
the sum is the mean squared change of m that the site's rounding causes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from qvlm_plugin import plugins
from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.kernels.reference import round_activation
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.hidden import predicting
from qvlm_plugin.methods.importance import visit_jacobians
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.report.ablations.layer_errors import unseen_samples
from qvlm_plugin.report.figures import Panel, Series, panels_figure
from qvlm_plugin.report.results import Grid
from qvlm_plugin.report.writing import Report, stand_in_note
from qvlm_plugin.scheme import Scheme
from qvlm_plugin.topology import Site

TOKENS = ("first", "image", "text", "answer")
"""Kinds of tokens: the first of a prompt, image tokens, other text, and those that predict an answer's tokens."""


def token_kinds(ids: Tensor, attended: Tensor, answer: Tensor, image_token: int) -> Tensor:
    """Index into `TOKENS` of each token: int64 [N] for the N attended tokens, row by row.

    Args:
        ids: int64 [B, T], padded on the left.
        attended: bool [B, T].
        answer: bool [B, T], True for the answers' tokens.
        image_token: id of the image token.
    """
    kinds = torch.full_like(ids, TOKENS.index("text"))
    kinds[ids == image_token] = TOKENS.index("image")
    kinds[predicting(answer)] = TOKENS.index("answer")
    kinds[torch.arange(len(ids)), attended.int().argmax(dim=1)] = TOKENS.index("first")
    return kinds[attended]


def error_sources(
    loaded: LoadedModel, plan: RoundingPlan, samples: CalibrationSet, batch_size: int
) -> dict[Site, Tensor]:
    """Weighted squared error of each static decoder site, by kind of token.

    Args:
        loaded: the model in full precision.
        plan: a plan for it, without folds.
        samples: samples with answers that the plan was not calibrated on.
        batch_size: samples per pass.

    Returns:
        Means over samples for each site, float64 [4], in the order of `TOKENS`.
    """
    formats = {module.site: module.activation for module in plan.modules if module.activation.kind == "static_channel"}
    options = MethodOptions(calibration_batch_size=batch_size)
    topology = plugins.topology_of(loaded)
    context = SearchContext(loaded, topology, Scheme.parse(plan.scheme), options, samples)
    image_token = loaded.model.config.image_token_id
    kinds = [
        token_kinds(inputs["input_ids"], inputs["attention_mask"].bool(), answer, image_token)
        for inputs, answer in samples.batches(loaded.processor, batch_size)
    ]

    @torch.no_grad()
    def visit(site: Site, tokens: Tensor, jacobian: Tensor, batch: int) -> Tensor:
        parameters = {bound: plan.tensors[f"{site.name}/{bound}"].to(tokens.device) for bound in ("lower", "upper")}
        error = round_activation(tokens, formats[site.name], parameters).float() - tokens.float()
        each = (error * jacobian.float()).square().sum(dim=1).double().cpu()
        return torch.zeros(len(TOKENS), dtype=torch.float64).index_add_(0, kinds[batch], each)

    totals, _ = visit_jacobians(context, [site for site in context.sites if site.name in formats], visit)
    return {site: totals[site] / len(samples.samples) for site in context.sites if site in totals}


@dataclass(frozen=True)
class _Kind:
    """The sites of all layers that feed the same Linears."""

    name: str
    sites: tuple[Site, ...]


def sources_report(
    loaded: LoadedModel, plans: Mapping[str, RoundingPlan], samples: CalibrationSet, batch_size: int, command: str
) -> Report:
    """Error sources under each plan, by layer, kind of site and kind of token.

    Args:
        loaded: the model in full precision.
        plans: plans by their displayed names.
        samples: samples that plans were calibrated on are left out.
        batch_size: samples per pass.
        command: the command line, for the report.
    """
    for plan in plans.values():
        samples = unseen_samples(samples, plan)
    found = {name: error_sources(loaded, plan, samples, batch_size) for name, plan in plans.items()}
    kinds = _kinds(next(iter(found.values())))
    panels = [
        Panel("decoder layer", "mean squared change of log-odds" if not index else "", series, log_y=True,
              integers=True, title=name)
        for index, (name, series) in enumerate((name, _series(errors, kinds)) for name, errors in found.items())
    ]  # fmt: skip
    return Report(
        name="sources",
        title="Where the quantization error of activations enters",
        command=command,
        tables=[_grid(found, kinds)],
        rows=[
            {"plan": name, "plan_hash": plans[name].hash, "site": site.name, "layer": site.block,
             **dict(zip(TOKENS, errors[site].tolist(), strict=True))}
            for name, errors in found.items()
            for site in errors
        ],
        notes=[
            *stand_in_note(samples),
            "Estimated mean squared change of the answers' log-odds (nats²) from rounding the inputs of these Linears "
            f"in all layers, each site separately: squared errors weighted by squared Jacobians, mean over "
            f"{len(samples.samples)} samples of `{samples.source}`, seed {samples.seed}, without those that the plans "
            "were calibrated on. Weights, vision tower and projector are in full precision.",
            "`first`: the first token, the attention sink; `answer`: the tokens that predict an answer's tokens.",
        ],
        figure=panels_figure([panels]),
    )  # fmt: skip


def _kinds(errors: Mapping[Site, Tensor]) -> list[_Kind]:
    def linears(site: Site) -> str:
        return ", ".join(name.rpartition(".")[2] for name in site.linears)

    ordered = sorted(errors, key=lambda site: (linears(site), site.block))
    kinds = [_Kind(name, tuple(sites)) for name, sites in groupby(ordered, linears)]
    first = [site for site in errors if site.block == ordered[0].block]
    return sorted(kinds, key=lambda kind: first.index(kind.sites[0]))


def _series(errors: Mapping[Site, Tensor], kinds: list[_Kind]) -> tuple[Series, ...]:
    return tuple(
        Series(kind.name, [site.block for site in kind.sites], [float(errors[site].sum()) for site in kind.sites])
        for kind in kinds
    )


def _grid(found: Mapping[str, Mapping[Site, Tensor]], kinds: list[_Kind]) -> Grid:
    rows = []
    for name, errors in found.items():
        for kind in kinds:
            rows.append((name, kind.name, *_cells(sum(errors[site] for site in kind.sites))))
        rows.append((name, "all", *_cells(sum(errors.values()))))
    return Grid(("plan", "inputs of", *TOKENS, "all tokens"), tuple(rows))


def _cells(values: Tensor) -> list[str]:
    return [f"{float(value):.2f}" for value in (*values, values.sum())]
