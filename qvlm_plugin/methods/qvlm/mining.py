"""Cross-layer dependency mining (CDM): partition the decoder by dependency, search each block's percentiles jointly.

Paper, section 3.2. Blocks are searched from the bottom up. A block's candidates run on the output of the quantized
layers below; its error is the distance of its output from the full-precision model's (Eq. 3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft, TokenWeights, build_plan, transformed
from qvlm_plugin.methods.hidden import HiddenCache, block_inputs, quantized_inputs
from qvlm_plugin.methods.observe import watching
from qvlm_plugin.methods.options import MiningOptions
from qvlm_plugin.methods.qvlm.block_dependency import BEFORE, dependencies
from qvlm_plugin.methods.qvlm.partition import partition
from qvlm_plugin.methods.qvlm.search import Tree, search_exhaustively, search_pruned, search_with_beam
from qvlm_plugin.methods.replacements import Replacements, quantized_modules, replaced
from qvlm_plugin.models.placement import execution_device, materialized
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.progress import Progress
from qvlm_plugin.quantizers import shrink_range, through_zero
from qvlm_plugin.scheme import UNQUANTIZED
from qvlm_plugin.topology import Site


@dataclass(frozen=True, eq=False)
class CandidateLayer:
    """One layer with quantized weights, which runs with any choice of activation parameters.

    Attributes:
        name: the layer's full name.
        layer: the layer in full precision.
        others: quantized replacements of its modules, by their names within it; on the device as long as this exists.
        sites: its activation quantizers, without those of experts that no calibration token reached.
        candidates: the activation parameters by name, for each site and each percentile of the grid.
    """

    name: str
    layer: nn.Module
    others: Replacements
    sites: tuple[Site, ...]
    candidates: Mapping[str, Sequence[Mapping[str, Tensor]]]

    @torch.no_grad()
    def run(self, choices: Mapping[str, int], hidden: HiddenCache) -> HiddenCache:
        """The layer's output with the chosen percentile (index into the grid, by site name) at each site."""
        parameters = {
            f"{linear.removeprefix(f'{self.name}.')}.{key}": value
            for site in self.sites
            for linear in site.linears
            for key, value in self.candidates[site.name][choices[site.name]].items()
        }
        with replaced(self.layer, self.others):
            return hidden.through(self.name, self.layer, parameters)

    def found(self, choices: Mapping[str, int]) -> dict[str, Tensor]:
        """The plan tensors of the chosen percentiles."""
        return {
            f"{site}/{key}": value
            for site, choice in choices.items()
            for key, value in self.candidates[site][choice].items()
        }


@dataclass(frozen=True)
class Searched:
    """The percentiles of a block's sites with the least error.

    Attributes:
        choices: {site name: index into the grid} for each layer.
        error: error of the block's output.
        output: the block's output with these percentiles; None if the search no longer has it.
    """

    choices: list[dict[str, int]]
    error: float
    output: HiddenCache | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class Mined:
    """The result of the search of a part.

    Attributes:
        tensors: activation parameters of every site of the part, as plan tensors.
        record: dependencies, blocks, percentiles and errors, as JSON data.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def search_blocks(context: SearchContext, draft: Draft) -> Draft:
    """Search the percentiles of all decoder layers, on top of the quantized vision tower and projector.

    With ``cdm_parts=vision+decoder`` the tower's blocks are searched first, in the same way.
    """
    for part in context.options.mined_parts:
        if getattr(context.scheme, part).activation != UNQUANTIZED:
            plan, weights = build_plan(context, draft), draft.token_weights if part == "decoder" else None
            # No variable refers to the caches here, so that `mine` frees them as it proceeds.
            mined = mine(context, plan, block_inputs(context, part), quantized_inputs(context, plan, part), weights)
            draft = draft.adding(mined.tensors, {"cdm" if part == "decoder" else f"cdm_{part}": mined.record})
    return draft


def mine(
    context: SearchContext,
    plan: RoundingPlan,
    reference: HiddenCache,
    quantized: HiddenCache,
    token_weights: TokenWeights | None = None,
) -> Mined:
    """Search the percentiles of all blocks of a part. Choices of finished blocks are kept in the context's workspace.

    Args:
        context: the search.
        plan: plan with the initial parameters of every site, which percentile 1 keeps.
        reference: input of the part's first block in the full-precision model.
        quantized: the same input with all earlier parts quantized.
        token_weights: factors of the tokens' errors, in addition to the options; None: all 1.
    """
    options, workspace, part = context.options, context.workspace, reference.part
    with Progress("dependencies") as progress:
        mutual = dependencies(context, plan, quantized)
        before = plan.record.get(BEFORE, mutual) if part == "decoder" else mutual
        h0 = mean(before) if options.h0 is None and before else options.h0 or 0.0
        blocks = partition(mutual, h0, options.max_depth)
        progress.describe("search of blocks", len(blocks))
        found: dict[str, Tensor] = {}
        rows = []
        for block in blocks:
            members, targets = [], []
            for index in block:
                member, reference = candidate_layer(context, plan, index, reference)
                members.append(member)
                targets.append(reference)
            step = f"{part}-{block.start}-{block.stop - 1}"
            if (kept := context.recalled(step)) is None:
                weights = token_weights and [context.shard.own(token_weights[index]) for index in block]
                best = search_block(members, quantized, targets, options, weights)
                workspace.keep(step, {"choices": best.choices, "error": best.error}, {})
            else:
                best = Searched(**kept[0])
            for member, chosen in zip(members, best.choices, strict=True):
                if best.output is None:
                    quantized = member.run(chosen, quantized)
                found |= member.found(chosen)
            quantized = best.output or quantized
            percentiles = [{site: options.percentiles[c] for site, c in chosen.items()} for chosen in best.choices]
            rows.append({"layers": list(block), "percentiles": percentiles, "error": best.error})
            del best  # frees the output unless it is the next block's input
            del member  # frees its rounded weights before those of the next block are made
            progress.advance()
    return Mined(found, {"dependencies": mutual, "h0": h0, "blocks": rows})


def search_block(
    members: Sequence[CandidateLayer],
    start: HiddenCache,
    targets: Sequence[HiddenCache],
    options: MiningOptions,
    token_weights: TokenWeights | None = None,
) -> Searched:
    """The percentiles of a block's sites with the least error of its output (Eq. 3).

    Args:
        members: the block's layers.
        start: the block's input in the quantized model.
        targets: each layer's output in full precision.
        options: options of the search.
        token_weights: token weights of the block's layers.

    Raises:
        QVLMError: an output or the error is not finite; the message names the layer.
    """
    # A step sets the percentile of one unit. Its state is (the layer's input, choices within the layer, the layer's
    # output); after the last unit of a layer: (the next layer's input, no choices, the same tensor).
    units = []
    for index, member in enumerate(members):
        names = [site.name for site in member.sites]
        units += [(index, names)] if options.unit == "layer" else [(index, [name]) for name in names]

    def run(step: int, candidate: int, state: tuple) -> tuple:
        index, names = units[step]
        before, choices, _ = state
        choices = choices | dict.fromkeys(names, candidate)
        complete = {site.name: choices.get(site.name, 0) for site in members[index].sites}
        output = members[index].run(complete, before)
        finished = step + 1 == len(units) or units[step + 1][0] != index
        return (output, {}, output) if finished else (before, choices, output)

    def tree_on(targets: Sequence[HiddenCache], token_weights: TokenWeights | None) -> Tree:
        def error(step: int, state: tuple) -> float:
            index = units[step][0]
            return state[2].error(targets[index], options, token_weights and token_weights[index])

        return Tree(len(units), len(options.percentiles), run, error)

    tree, before = tree_on(targets, token_weights), (start, {}, start)
    if options.beam:
        found = search_with_beam(tree, before, options.beam)
    elif options.prune == 1:
        found = search_exhaustively(tree, before)
    else:
        chosen = start.spread(options.prune)
        part_start = start.subset(chosen)
        weights = token_weights and [[layer[index] for index in chosen] for layer in token_weights]
        part = tree_on([target.subset(chosen) for target in targets], weights)
        found = search_pruned(part, (part_start, {}, part_start), tree, before)
    if not isfinite(found.error):
        raise QVLMError(f"the error of {members[-1].name} is not finite on calibration data; try relative_error=false")
    choices: list[dict[str, int]] = [{} for _ in members]
    for (index, names), candidate in zip(units, found.choices, strict=True):
        choices[index] |= dict.fromkeys(names, candidate)
    return Searched(choices, found.error, found.state and found.state[2])


def candidate_layer(
    context: SearchContext, plan: RoundingPlan, index: int, reference: HiddenCache
) -> tuple[CandidateLayer, HiddenCache]:
    """Layer ``index`` of a part, prepared for the search, and its full-precision output.

    Args:
        context: the search.
        plan: plan with the initial parameters of the layer's sites.
        index: index of the layer, from 0.
        reference: the layer's full-precision input.
    """
    name, layer = context.blocks(reference.part)[index]
    options, device = context.options, execution_device(layer)
    formats = {site: fmt for site, fmt in context.activation_sites.items() if site.name.startswith(f"{name}.")}
    # Experts that no calibration token reached have no parameters to search.
    own = [site for site, fmt in formats.items() if f"{site.name}/{fmt.parameters[0]}" in plan.tensors]
    own = [site for site in own if site.name not in plan.record.get("uncalibrated", ())]
    static = [site for site in own if formats[site].kind == "static_channel"]
    # Quantiles need all inputs of the sites. They are several times as large as the hidden states, and are kept on the
    # same device. A mean needs only their sum, which float64 makes independent of how the batches are divided.
    kept_on, quantile = reference.device, options.reading == "quantile"
    seen: dict[str, list[Tensor | tuple[Tensor, int]]] = {site.name: [] for site in static}

    def keep(site: Site, x: Tensor, mask: Tensor) -> None:
        tokens = transformed(plan, site, x[mask])
        seen[site.name].append(
            tokens.to(kept_on) if quantile else (tokens.sum(dim=0, dtype=torch.float64), len(tokens))
        )

    outputs = []
    with materialized(layer):
        for piece in reference.pieces():
            with watching(layer, static, piece.batches[0].attended, keep, prefix=f"{name}."):
                outputs.append(piece.through(name, layer))
        others = quantized_modules(plan, context.model, REFERENCE, (name,)).within(name)
    candidates = {}
    for site in own:
        initial = {key: plan.tensors[f"{site.name}/{key}"].to(device) for key in formats[site].parameters}
        if site in static:
            parts = context.shard.gathered(seen.pop(site.name))
            if quantile:
                bounds = quantile_bounds(torch.cat(parts).to(device), *initial.values(), options.percentiles)
            else:
                total, count = (sum(part) for part in zip(*parts, strict=True))
                bounds = fraction_bounds((total / count).to(device), *initial.values(), options.percentiles)
            if options.zero_on_grid:
                bounds = [through_zero(*pair, formats[site].bits) for pair in bounds]
            candidates[site.name] = [dict(zip(initial, pair, strict=True)) for pair in bounds]
        else:
            candidates[site.name] = [
                {"clip_ratio": (initial["clip_ratio"] * p).clamp(max=formats[site].largest_ratio)}
                for p in options.percentiles
            ]
    return CandidateLayer(name, layer, others, tuple(own), candidates), reference.joined(outputs)


Bounds = tuple[Tensor, Tensor]
"""Lower and upper bounds [C] of a static per-channel site."""


def fraction_bounds(center: Tensor, lower: Tensor, upper: Tensor, percentiles: Sequence[float]) -> list[Bounds]:
    """With ``reading=fraction``: the initial bounds pulled towards the mean by each percentile; 1 keeps them.

    Args:
        center: mean full-precision input of the site [C], in any floating-point type.
        lower, upper: initial bounds [C].
        percentiles: positive; above 1 they widen the range.
    """
    center = center.to(lower.dtype).clamp(lower, upper)
    return [(lower, upper) if p == 1 else shrink_range(lower, upper, center, p) for p in percentiles]


def quantile_bounds(tokens: Tensor, lower: Tensor, upper: Tensor, percentiles: Sequence[float]) -> list[Bounds]:
    """With ``reading=quantile``: each channel's quantiles 1 - p and p within the initial bounds; 1 keeps these.

    Args:
        tokens: full-precision inputs of the site [N, C].
        lower, upper: initial bounds [C].
        percentiles: p in (0, 1].
    """
    pairs = zip(percentiles, *_quantiles(tokens, percentiles), strict=True)
    return [(lower, upper) if p == 1 else _narrowed(lower, upper, low, high) for p, low, high in pairs]


def _narrowed(lower: Tensor, upper: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The part of the initial bounds that lies between the quantiles; the quantiles where there is none.

    A channel's initial bounds may lie above nearly all of its values, if they surround the mean of a channel in which
    one token is massive.
    """
    found = torch.maximum(lower, low), torch.minimum(upper, high)
    apart = found[0] > found[1]
    return torch.where(apart, low, found[0]), torch.where(apart, high, found[1])


SORTED = 2**24
"""Elements that are sorted at a time: values, indices and a copy take 64 to 128 MB each. An MLP of a 7B model has 423
million for 64 samples of 600 tokens."""


def _quantiles(tokens: Tensor, percentiles: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The quantiles ``1 - p`` and ``p`` of each channel of ``tokens`` [N, C], by rank: two float32 tensors [P, C]."""
    # torch.quantile refuses tensors of more than 16 million elements.
    last = len(tokens) - 1
    ranks = [round((1 - p) * last) for p in percentiles] + [round(p * last) for p in percentiles]
    channels = max(1, SORTED // len(tokens))
    parts = [part.float().sort(dim=0).values[ranks] for part in tokens.split(channels, dim=1)]
    return torch.cat(parts, dim=1).chunk(2)
