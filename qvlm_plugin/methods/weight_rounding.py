"""``rounding=gptq``: the codes of all weights, block by block in the order of the computation.

Each block's input comes from the quantized blocks before it. Within a block, sites are rounded in the order of the
computation: a Linear's input is the output of Linears that are already rounded, after the transform and the rounding of
its own site.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, repeat

import torch
from torch import Tensor, nn

from qvlm_plugin.formats import WeightFormat, stored_format
from qvlm_plugin.kernels.reference import REFERENCE, round_activation
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft, build_plan, transformed
from qvlm_plugin.methods.gptq import Factors, Moments, gptq
from qvlm_plugin.methods.hidden import HiddenCache, block_inputs, quantized_inputs
from qvlm_plugin.methods.replacements import Replacements, changed_values, quantized_module, quantized_modules, replaced
from qvlm_plugin.methods.shard import OrderedSum
from qvlm_plugin.models.placement import materialized
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.plan_header import ModulePlan
from qvlm_plugin.progress import Progress
from qvlm_plugin.quantizers import stored_parameters
from qvlm_plugin.scheme import UNQUANTIZED
from qvlm_plugin.topology import ORDER, Blocks, Site, chains_of


def round_weights(context: SearchContext, draft: Draft) -> Draft:
    """Add ``<linear>/codes`` and their scales for every Linear whose weight the scheme rounds.

    Experts that no calibration token reached have none. Codes of finished blocks are kept in the context's workspace.
    """
    for part in ORDER:
        if getattr(context.scheme, part).weight != UNQUANTIZED:
            for blocks in chains_of(context.topology, context.model, part):
                draft = _round_chain(context, draft, part, blocks)
    return draft


def _round_chain(context: SearchContext, draft: Draft, part: str, blocks: Blocks) -> Draft:
    plan = build_plan(context, draft)
    reference = block_inputs(context, part, blocks) if context.options.correction else None
    hidden = quantized_inputs(context, plan, part, blocks)
    with Progress(f"rounding weights, {part}", len(blocks)) as progress:
        for index, (name, layer) in enumerate(blocks):
            if (kept := context.recalled(f"rounding-{name}")) is None:
                weights = _token_weights(context, draft, part, index, hidden)
                with materialized(layer):
                    kept = {}, round_block(context, plan, (name, layer), (hidden, reference), weights)
                context.workspace.keep(f"rounding-{name}", *kept)
            draft = draft.with_codes(kept[1])
            with materialized(layer):
                finished = quantized_modules(build_plan(context, draft), context.model, REFERENCE, (name,)).within(name)
            with replaced(layer, finished):
                hidden = hidden.through(name, layer)
            reference = reference and reference.through(name, layer)
            del finished  # frees its weights before the next block is copied
            progress.advance()
    return draft


def _token_weights(
    context: SearchContext, draft: Draft, part: str, index: int, hidden: HiddenCache
) -> list[Tensor] | None:
    """The token weights of a decoder layer, [N] for each batch of this process; None if the draft has none."""
    if part != "decoder" or draft.token_weights is None:
        return None
    own = context.shard.own(draft.token_weights[index])
    return [weights[batch.attended.to(weights.device)] for weights, batch in zip(own, hidden.batches, strict=True)]


@torch.no_grad()
def round_block(
    context: SearchContext,
    plan: RoundingPlan,
    block: tuple[str, nn.Module],
    inputs: tuple[HiddenCache, HiddenCache | None],
    token_weights: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """The codes of a block's weights, as plan tensors.

    Args:
        context: the search.
        plan: the plan of the previous steps.
        block: the block's full name, and the block in full precision, on its device.
        inputs: the block's input in the quantized model, and in full precision if ``correction`` needs it, else None.
        token_weights: factors of the tokens' squared errors, [N] for each batch; None: all 1.
    """
    (name, layer), (hidden, reference) = block, inputs
    sites = [site for site in context.weight_sites if site.name.startswith(f"{name}.")]
    modules = {module.name: module for module in plan.modules}
    linears = [linear for site in sites for linear in site.linears]
    unrounded = [modules[linear].model_copy(update={"weight": WeightFormat()}) for linear in linears]
    current = {module.name: quantized_module(plan, module, context.model, REFERENCE) for module in unrounded}
    values, found = changed_values(plan, context.model, (name,)), {}
    for level in _levels(sites):
        # Experts process other tokens in the quantized model than in full precision.
        wanted = None if reference is None or level[0].expert else [*reference.inputs(name, layer, level)]
        with replaced(layer, Replacements(current, values).within(name)):
            seen = zip(hidden.inputs(name, layer, level), token_weights or repeat(None), strict=False)
            moments = _moments(context, plan, current, seen, wanted)
        for site in level:
            factors = None
            if site.name in moments:
                factors = Factors.of(moments[site.name].to(current[site.name].weight.device), context.options)
            for linear in site.linears:
                module = modules[linear]
                if factors is not None:
                    found |= _codes(context, plan, module, current[linear], factors)
                    module = module.model_copy(update={"weight": stored_format(module.weight)})
                now = replace(plan, tensors={**plan.tensors, **found})
                current[linear] = quantized_module(now, module, context.model, REFERENCE)
    return found


def _levels(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Groups of sites in the order of the computation: a single site, or the same site of all experts."""
    for _, level in groupby(sites, lambda site: site.name.removeprefix(site.expert or "")):
        yield list(level)


def _moments(
    context: SearchContext,
    plan: RoundingPlan,
    current: Mapping[str, QuantLinear],
    seen: Iterable[tuple[dict[Site, Tensor], Tensor | None]],
    wanted: Sequence[Mapping[Site, Tensor]] | None,
) -> dict[str, Moments]:
    """Second moments of the rounded inputs, by site name.

    Args:
        context: the search.
        plan: the plan, with the transforms of the inputs.
        current: the Linears, by name.
        seen: inputs of sites in the quantized model, which are removed from the dictionaries, and token weights, batch
            by batch.
        wanted: inputs of sites in full precision, untransformed, batch by batch; None without ``correction``, and for
            experts.
    """

    def moments_of(index: int, batch: dict[Site, Tensor], token_weights: Tensor | None) -> dict[str, Moments]:
        found = {}
        for site in list(batch):
            x, layer = batch.pop(site), current[site.name]  # freed before the next batch is computed
            inputs = round_activation(layer.rotated(x), layer.activation_format, layer._parameters)
            reference = wanted and transformed(plan, site, wanted[index][site])
            weights = None if site.expert else token_weights  # an expert processes only some of the tokens
            if context.options.token_errors == "relative":
                relative = 1 / inputs.float().square().sum(dim=1).clamp_min(1e-12)
                weights = relative if weights is None else relative * weights.to(relative.device)
            found[site.name] = Moments.of(inputs, reference, weights)
        return found

    sums = OrderedSum(context.shard)
    for index, (batch, token_weights) in enumerate(seen):
        sums.add(moments_of(index, batch, token_weights))
    return sums.total()


def _codes(
    context: SearchContext, plan: RoundingPlan, module: ModulePlan, layer: QuantLinear, factors: Factors
) -> dict[str, Tensor]:
    clip = plan.tensors[f"{module.name}/clip"] if module.weight.clipped else None
    quantized = gptq(layer.weight, module.weight, factors, context.options.correction, clip)
    parameters = stored_parameters(quantized, stored_format(module.weight))
    return {f"{module.name}/{name}": tensor.cpu() for name, tensor in parameters.items()}
