"""The importance of rounding errors: Jacobians of the answers with respect to the decoder's activations.

The l_p distance of section 4.1 and the block error of Eq. 3 weight all tokens and channels equally. But an error e in
an activation x changes the answer by about e · ∂m/∂x, and these Jacobians differ by orders of magnitude: in the upper
layers answers no longer depend on most image tokens, while most attention is on the first token.
``importance=jacobian`` therefore weights squared errors by (∂m/∂x)² - the diagonal of a Gauss-Newton matrix - where m
is the log-odds of the answers' tokens in the full-precision model: per element in the search of ranges, per token in
the error of a block.

The paper weights layers by Jacobians (Eq. 8). Weighting elements by them, and a separate ratio for each channel, are
our deviations, and off by default.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature

from qvlm_plugin.conversation import to_device
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft, TokenWeights, transformed, transformed_gradient
from qvlm_plugin.methods.gradients import (
    OverflowedError,
    checkpointed,
    frozen,
    last_positions,
    require_answers,
    with_loss_scale,
)
from qvlm_plugin.methods.minmax import observe
from qvlm_plugin.methods.observe import watching
from qvlm_plugin.methods.shard import OrderedSum
from qvlm_plugin.observers import RangeGrid, best_ratio, channel_lp_losses
from qvlm_plugin.quantizers import widen
from qvlm_plugin.topology import Site


def log_odds(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p/(1 - p) of the given tokens. Unlike that of log p, its gradient does not vanish where p is close to 1.

    Args:
        logits: [N, V].
        tokens: int64 [N].

    Returns:
        [N], float32 or wider.
    """
    logits, index = widen(logits), tokens.unsqueeze(1)
    others = logits.scatter(1, index, float("-inf"))
    return logits.gather(1, index).squeeze(1) - others.logsumexp(dim=1)


def visit_jacobians(
    context: SearchContext, sites: Sequence[Site], visit: Callable[[Site, Tensor, Tensor, int], Tensor]
) -> tuple[dict[Site, Tensor], TokenWeights]:
    """Run forward and backward passes over the calibration set, and sum the results of ``visit`` for each site.

    Args:
        context: the search; its model runs in full precision, on samples with answers.
        sites: sites of the decoder.
        visit: called as ``visit(site, tokens, jacobian, batch)`` for every batch, from the last layer to the first,
            with the input [N, C] of the site without padding, the gradient [N, C] of the summed log-odds of all answer
            tokens with respect to it, and the batch's index; again for a batch whose gradients have overflowed.

    Returns:
        The sum over batches of what ``visit`` returns, by site; and ‖∂m/∂x‖² for each token of each decoder layer's
        output.

    Raises:
        QVLMError: a Jacobian is not finite.
    """
    model = context.model
    layers = [layer for _, layer in context.layers]
    sums, weights = OrderedSum(context.shard), []
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(frozen(model))
        stack.enter_context(checkpointed(layers))
        if context.footprint.caches_on_cpu:
            stack.enter_context(torch.autograd.graph.save_on_cpu())
        for index, (inputs, answer) in enumerate(context.batches("importance"), context.share.start):

            def run(
                scale: float, index: int = index, inputs: BatchFeature = inputs, answer: Tensor = answer
            ) -> _Collector:
                seen = _Collector(lambda *shown: visit(*shown, index), scale, len(layers))
                with _collecting(context, sites, inputs["attention_mask"].bool(), seen):
                    (_answer_odds(context, inputs, answer) * scale).backward()
                return seen

            seen = with_loss_scale(run)
            sums.add(seen.found)
            weights.append(seen.weights)
    by_layer = zip(*context.shard.gathered(weights), strict=True)
    return sums.total(), [list(layer) for layer in by_layer]


def _answer_odds(context: SearchContext, inputs: BatchFeature, answer: Tensor) -> Tensor:
    """The summed log-odds of a batch's answer tokens."""
    longest = int(answer.sum(dim=1).max())
    placed = to_device(inputs, context.device, context.model.dtype)
    kept = last_positions(answer, longest + 1)
    logits = context.model(**placed, use_cache=False, logits_to_keep=kept).logits[:, :-1]
    is_answer = answer[:, -longest:].to(logits.device)
    tokens = placed["input_ids"][:, -longest:].to(logits.device)
    return log_odds(logits[is_answer], tokens[is_answer]).sum()


class _Collector:
    """Collects inputs and gradients of one batch during the backward pass of a loss multiplied by ``scale``."""

    def __init__(self, visit: Callable[[Site, Tensor, Tensor], Tensor], scale: float, layers: int) -> None:
        self.visit, self.scale = visit, scale
        self.found: dict[Site, Tensor] = {}
        self.weights: list[Tensor | None] = [None] * layers
        self.inputs: dict[Site, Tensor | None] = {}

    def forward(self, site: Site, x: Tensor, mask: Tensor) -> None:
        # A hook that refers to x would keep the inputs of all layers in memory. Instead x is taken from the second
        # call, when the backward pass recomputes the layer, before any of its gradients.
        if site in self.inputs:
            self.inputs[site] = x.detach()
        else:
            self.inputs[site] = None
            x.register_hook(lambda gradient: self.site(site, mask, gradient))

    def site(self, site: Site, mask: Tensor, gradient: Tensor) -> None:
        x, self.inputs[site] = self.inputs[site], None
        jacobian = widen(gradient[mask]) / self.scale
        _require_finite(jacobian, f"the input of {site.name}")
        self.found[site] = self.visit(site, x[mask], jacobian)

    def layer(self, index: int, mask: Tensor, gradient: Tensor) -> None:
        jacobian = widen(gradient) / self.scale
        _require_finite(jacobian[mask.to(jacobian.device)], f"the output of layer {index}")
        self.weights[index] = jacobian.square().sum(dim=-1).float()


def _require_finite(jacobian: Tensor, where: str) -> None:
    if not jacobian.isfinite().all():
        raise OverflowedError(f"the Jacobian at {where} is not finite; try dtype=float32")


@contextmanager
def _collecting(context: SearchContext, sites: Sequence[Site], attended: Tensor, seen: _Collector) -> Iterator[None]:
    """While active, forward passes register hooks that pass the gradients of the backward pass to ``seen``."""
    model = context.model

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # Parameters are frozen, so the graph starts at the decoder's input.
        return args, kwargs | {"inputs_embeds": kwargs["inputs_embeds"].detach().requires_grad_()}

    def weigh(index: int, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        states = output[0] if isinstance(output, tuple) else output
        states.register_hook(partial(seen.layer, index, attended))

    handles = [model.get_submodule(context.topology.decoder_path).register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [layer.register_forward_hook(partial(weigh, index)) for index, (_, layer) in enumerate(context.layers)]
    try:
        with watching(model, sites, attended, seen.forward):
            yield
    finally:
        for handle in handles:
            handle.remove()


def search_important_ranges(context: SearchContext, draft: Draft) -> Draft:
    """For each channel of static decoder sites, search the ratio with the least weighted l_p distance.

    Of equal ratios the widest is kept. Adds the bounds of the sites, and the token weights of `visit_jacobians`.
    """
    options = context.options
    formats = {site: fmt for site, fmt in context.activation_sites.items() if fmt.kind == "static_channel"}
    statistics = observe(context, list(formats), draft)

    @torch.no_grad()
    def visit(site: Site, tokens: Tensor, jacobian: Tensor, batch: int) -> Tensor:
        tokens, jacobian = transformed(draft, site, tokens), transformed_gradient(draft, site, jacobian)
        weights = jacobian.float().square()
        grid = RangeGrid(options.ratios, formats[site].bits, options.norm)
        return channel_lp_losses(tokens, statistics[site.name].to(tokens.device), grid, weights)

    losses, token_weights = visit_jacobians(context, list(formats), visit)
    tensors = {}
    for site, loss in losses.items():
        bounds = statistics[site.name].to(loss.device).range(best_ratio(loss, options.ratios))
        tensors[f"{site.name}/lower"], tensors[f"{site.name}/upper"] = bounds
    return replace(draft.adding(tensors), token_weights=token_weights)


def weigh_tokens(context: SearchContext, draft: Draft) -> Draft:
    """Add the token weights of `visit_jacobians`; for ``importance=modality`` those of `by_modality`."""
    _, weights = visit_jacobians(context, [], lambda *seen: seen[1])
    if context.options.importance == "modality":
        size, images, texts = context.options.calibration_batch_size, [], []
        for inputs, _ in context.calibration.batches(context.loaded.processor, size):
            images.append(inputs["input_ids"] == context.model.config.image_token_id)
            texts.append(inputs["attention_mask"].bool() & ~images[-1])
        weights = by_modality(weights, images, texts)
    return replace(draft, token_weights=weights)


def by_modality(weights: TokenWeights, images: Sequence[Tensor], texts: Sequence[Tensor]) -> TokenWeights:
    """One weight for all image tokens of a layer, and 1 for text tokens (MBQ, Li et al., 2025).

    The weight is the ratio of the mean gradient norms of image and text tokens, and at least the median of the layers'
    ratios, as in MBQ's code. Here gradients are those of the answers' log-odds at the layer's output, and text includes
    the question; MBQ takes gradients of the answers' loss after attention and after the MLP, and only answers as text.

    Args:
        weights: squared gradient norms.
        images, texts: masks of image and of text tokens, bool [B, T] of each batch.
    """
    ratios = [_mean_norm(layer, images) / _mean_norm(layer, texts) for layer in weights]
    least = median(ratios)
    return [
        [torch.where(image.to(old.device), max(ratio, least), 1.0) for old, image in zip(layer, images, strict=True)]
        for layer, ratio in zip(weights, ratios, strict=True)
    ]


def _mean_norm(weights: Sequence[Tensor], chosen: Sequence[Tensor]) -> float:
    """The mean gradient norm of the chosen tokens; at least 1e-30, so that it can be a divisor."""
    norms = [batch[tokens.to(batch.device)].sqrt() for batch, tokens in zip(weights, chosen, strict=True)]
    found = torch.cat(norms)
    return max(float(found.mean()) if len(found) else 0.0, 1e-30)


def require_answers_for_importance(context: SearchContext) -> None:
    """Check that every sample has an answer; see `require_answers`."""
    require_answers(context.calibration, f"importance={context.options.importance}", "importance=uniform")
