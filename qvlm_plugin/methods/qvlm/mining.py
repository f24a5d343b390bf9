"""Cross-layer dependency mining (CDM): partition the decoder by dependency, search each block's percentiles jointly.

Paper, section 3.2. Blocks are taken bottom to top. A block's candidates run on what the already quantized layers below
produce; its error is measured against what the full-precision model has there (Eq. 3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.methods.blocks import Batch, Hidden, TokenWeights, output_error, replaced, run_layer
from qvlm_plugin.methods.observe import watching
from qvlm_plugin.methods.qvlm.dependency import layer_dependency
from qvlm_plugin.methods.qvlm.options import MiningOptions
from qvlm_plugin.methods.qvlm.partition import partition
from qvlm_plugin.methods.qvlm.search import search_exhaustively, search_with_beam
from qvlm_plugin.models.placement import execution_device, materialized
from qvlm_plugin.plan import quantized_linear
from qvlm_plugin.plan_header import ModulePlan
from qvlm_plugin.progress import Progress
from qvlm_plugin.quantizers import shrink_range
from qvlm_plugin.topology import Site
from qvlm_plugin.workspace import Workspace


@dataclass(frozen=True, eq=False)
class CandidateLayer:
    """One decoder layer with quantized weights, whose activation bounds are given anew at every run.

    Attributes:
        name: full name.
        layer: in full precision.
        linears: what stands in for its Linears, by their names in it; on the device as long as the candidate lives.
        sites: its activation quantizers, less those of experts that no calibration token reached.
        bounds: (lower, upper) [C] for each site and each percentile of the grid.
    """

    name: str
    layer: nn.Module
    linears: Mapping[str, QuantLinear]
    sites: tuple[Site, ...]
    bounds: Mapping[str, Sequence[tuple[Tensor, Tensor]]]

    @torch.no_grad()
    def run(self, choices: Mapping[str, int], hidden: Hidden, batches: Sequence[Batch]) -> Hidden:
        """Outputs with the chosen percentile (index into the grid, by site name) at each site."""
        parameters = {}
        for site in self.sites:
            lower, upper = self.bounds[site.name][choices[site.name]]
            for linear in site.linears:
                relative = linear.removeprefix(f"{self.name}.")
                parameters |= {f"{relative}.lower": lower, f"{relative}.upper": upper}
        with replaced(self.layer, self.linears, {}):
            return run_layer(self.name, self.layer, hidden, batches, parameters)


@dataclass(frozen=True, eq=False)
class Mined:
    """What the search decided.

    Attributes:
        tensors: bounds of every decoder site, as plan tensors.
        record: dependencies, blocks, percentiles and errors, as JSON data.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]


def dependencies(
    layers: Sequence[tuple[str, nn.Module]], hidden: Hidden, batches: Sequence[Batch], bits: int
) -> list[float]:
    """D(k, k+1) between the outputs of consecutive full-precision layers, given with their names (Eq. 4)."""
    values, previous = [], None
    for name, layer in layers:
        hidden = run_layer(name, layer, hidden, batches)
        tokens = torch.cat(
            [states[batch.attended.to(states.device)] for states, batch in zip(hidden, batches, strict=True)]
        )
        if previous is not None:
            values.append(layer_dependency(previous, tokens, bits))
        previous = tokens
    return values


def mine(
    layers: Sequence[tuple[str, nn.Module]],
    sites: Sequence[Site],
    modules: Mapping[str, ModulePlan],
    tensors: Mapping[str, Tensor],
    reference: Hidden,
    quantized: Hidden,
    batches: Sequence[Batch],
    bits: int,
    options: MiningOptions,
    workspace: Workspace,
    token_weights: TokenWeights | None = None,
) -> Mined:
    """Search the percentiles of all decoder layers.

    Args:
        layers: full-precision decoder layers with their names, bottom to top.
        sites: the decoder's activation quantizers.
        modules: what becomes of each Linear, by name.
        tensors: plan tensors with the initial bounds of every site, which percentile 1 keeps.
        reference: input of the first layer in the full-precision model.
        quantized: the same where everything below is already quantized.
        batches: what goes with them.
        bits: activation width.
        options: of the search.
        workspace: where the choices of finished blocks are kept.
        token_weights: how much each token's error counts beside that; None counts all alike.
    """
    with Progress("dependencies") as progress:
        mutual = dependencies(layers, reference, batches, bits)
        blocks = partition(mutual, options.h0, options.max_depth)
        progress.describe("search of blocks", len(blocks))
        found: dict[str, Tensor] = {}
        rows = []
        for block in blocks:
            members, targets = [], []
            for index in block:
                member, reference = candidate_layer(
                    *layers[index], sites, modules, tensors, reference, batches, options
                )
                members.append(member)
                targets.append(reference)
            step = f"layers-{block.start}-{block.stop - 1}"
            if (kept := workspace.recall(step)) is None:
                weights = token_weights and [token_weights[index] for index in block]
                choices, error = search_block(members, quantized, targets, batches, options, weights)
                kept = {"choices": choices, "error": error}, {}
                workspace.keep(step, *kept)
            choices, error = kept[0]["choices"], kept[0]["error"]
            for member, chosen in zip(members, choices, strict=True):
                quantized = member.run(chosen, quantized, batches)
                for site in member.sites:
                    lower, upper = member.bounds[site.name][chosen[site.name]]
                    found |= {f"{site.name}/lower": lower, f"{site.name}/upper": upper}
            percentiles = [{site: options.percentiles[c] for site, c in chosen.items()} for chosen in choices]
            rows.append({"layers": list(block), "percentiles": percentiles, "error": error})
            progress.advance()
    return Mined(found, {"dependencies": mutual, "blocks": rows})


def search_block(
    members: Sequence[CandidateLayer],
    start: Hidden,
    targets: Sequence[Hidden],
    batches: Sequence[Batch],
    options: MiningOptions,
    token_weights: TokenWeights | None = None,
) -> tuple[list[dict[str, int]], float]:
    """The percentiles of a block's sites that bring its output closest to full precision.

    Args:
        members: the block's layers.
        start: the block's input in the quantized model.
        targets: each layer's output in full precision.
        batches, options: as for `mine`.
        token_weights: of the block's layers.

    Returns:
        For each layer {site name: index into the grid}; and the block's error.

    Raises:
        QVLMError: an output or the error is not finite; the message names the layer.
    """
    # A step sets the percentile of one unit; its state is (layer's input, choices within the layer, layer's output).
    units = []
    for index, member in enumerate(members):
        names = [site.name for site in member.sites]
        units += [(index, names)] if options.unit == "layer" else [(index, [name]) for name in names]

    def run(step: int, candidate: int, state: tuple) -> tuple:
        index, names = units[step]
        before, choices, output = state
        if step and units[step - 1][0] != index:
            before, choices = output, {}
        choices = choices | dict.fromkeys(names, candidate)
        complete = {site.name: choices.get(site.name, 0) for site in members[index].sites}
        return before, choices, members[index].run(complete, before, batches)

    def error(step: int, state: tuple) -> float:
        index = units[step][0]
        weights = token_weights and token_weights[index]
        return output_error(state[2], targets[index], batches, options.tokens, options.relative_error, weights)

    arguments = (len(units), len(options.percentiles), (start, {}, start), run, error)
    found = search_with_beam(*arguments, options.beam) if options.beam else search_exhaustively(*arguments)
    if not isfinite(found.error):
        raise QVLMError(f"the error of {members[-1].name} is not finite on calibration data; try relative_error=false")
    chosen: list[dict[str, int]] = [{} for _ in members]
    for (index, names), candidate in zip(units, found.choices, strict=True):
        chosen[index] |= dict.fromkeys(names, candidate)
    return chosen, found.error


def candidate_layer(
    name: str,
    layer: nn.Module,
    sites: Sequence[Site],
    modules: Mapping[str, ModulePlan],
    tensors: Mapping[str, Tensor],
    reference: Hidden,
    batches: Sequence[Batch],
    options: MiningOptions,
) -> tuple[CandidateLayer, Hidden]:
    """A layer ready to be searched, and its full-precision output."""
    # An expert that no calibration token reached has no bounds to search.
    own = tuple(site for site in sites if site.name.startswith(f"{name}.") and f"{site.name}/lower" in tensors)
    # Inputs of all sites at once are several times the hidden states: they are kept where these are.
    kept_on, device = reference[0].device, execution_device(layer)
    inputs: dict[str, list[Tensor]] = {site.name: [] for site in own}

    def keep(site: Site, x: Tensor, mask: Tensor) -> None:
        inputs[site.name].append(x[mask].to(kept_on))

    linears, output = {}, []
    with materialized(layer):
        for states, batch in zip(reference, batches, strict=True):
            with watching(layer, own, batch.attended, keep, prefix=f"{name}."):
                output += run_layer(name, layer, [states], [batch])
        for linear_name, module in modules.items():
            if linear_name.startswith(f"{name}.") and not module.is_identity:
                relative = linear_name.removeprefix(f"{name}.")
                linears[relative] = quantized_linear(module, layer.get_submodule(relative), tensors, REFERENCE)
    bounds = {}
    for site in own:
        tokens = torch.cat(inputs.pop(site.name)).to(device)
        initial = tuple(tensors[f"{site.name}/{bound}"].to(device) for bound in ("lower", "upper"))
        bounds[site.name] = percentile_bounds(tokens, *initial, options.percentiles, options.reading)
    return CandidateLayer(name, layer, linears, own, bounds), output


def percentile_bounds(
    tokens: Tensor, lower: Tensor, upper: Tensor, percentiles: Sequence[float], reading: str
) -> list[tuple[Tensor, Tensor]]:
    """Bounds [C] of a static per-channel site at each percentile of the grid; 1 keeps the initial bounds.

    Args:
        tokens: full-precision inputs of the site [N, C].
        lower, upper: initial bounds [C].
        percentiles: p in (0, 1].
        reading: ``fraction`` or ``quantile``, see `MiningOptions`.
    """
    if reading == "fraction":
        mean = tokens.float().mean(dim=0).clamp(lower, upper)
        bounds = [shrink_range(lower, upper, mean, p) for p in percentiles]
    else:
        pairs = zip(*_quantiles(tokens, percentiles), strict=True)
        bounds = [(torch.maximum(lower, low), torch.minimum(upper, high)) for low, high in pairs]
    return [(lower, upper) if p == 1 else found for p, found in zip(percentiles, bounds, strict=True)]


SORTED = 2**24
"""Elements that are sorted at a time: values, indices and a copy of 64 to 128 MB each, where 64 samples of 600 tokens
have 423 million in an MLP of 7B."""


def _quantiles(tokens: Tensor, percentiles: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The values of ranks ``1 - p`` and ``p`` in each channel of ``tokens`` [N, C]: two float32 tensors [P, C]."""
    # Sorted values rather than torch.quantile, which refuses tensors of more than 16 million elements.
    last = len(tokens) - 1
    ranks = [round((1 - p) * last) for p in percentiles] + [round(p * last) for p in percentiles]
    channels = max(1, SORTED // len(tokens))
    parts = [part.float().sort(dim=0).values[ranks] for part in tokens.split(channels, dim=1)]
    return torch.cat(parts, dim=1).chunk(2)
