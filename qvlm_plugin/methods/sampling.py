"""A sample of each site's input tokens, small enough to keep for all sites."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import TokenWeights
from qvlm_plugin.methods.observe import visit_site_inputs
from qvlm_plugin.methods.shard import Shard
from qvlm_plugin.topology import Site


@dataclass(frozen=True, eq=False)
class Sample:
    """Input tokens of a site.

    Attributes:
        tokens: [N, C] in the compute type, on the CPU.
        weights: factors of their squared errors, float32 [N].
    """

    tokens: Tensor
    weights: Tensor

    def weighted(self, device: torch.device) -> Tensor:
        """The tokens scaled so that their squared errors are the weighted ones: float32 [N, C]."""
        return (self.tokens.float() * self.weights.sqrt().unsqueeze(1)).to(device)


def sample_tokens(
    context: SearchContext, sites: Sequence[Site], count: int, token_weights: TokenWeights | None = None
) -> dict[str, Sample]:
    """Input tokens of each site, drawn uniformly from the whole calibration set, with answers and without padding.

    Every token gets a random key, and the tokens with the smallest keys are kept: this takes one pass, and the sample
    does not depend on the batch size. The seed is that of the calibration set.

    Args:
        context: the search.
        sites: the sites to sample.
        count: tokens to keep of each site; all of them if there are fewer.
        token_weights: weights of the decoder's tokens; tokens of experts and of other parts have weight 1.

    Returns:
        min(count, N) tokens by site name.
    """
    generators = {site.name: torch.Generator().manual_seed(context.calibration.seed) for site in sites}
    kept: dict[str, tuple[Tensor, Sample]] = {}
    weights = {site: _weights(context, site, token_weights) for site in sites}

    def visit(site: Site, tokens: Tensor) -> int:
        new = Sample(tokens, next(weights[site], torch.ones(len(tokens))))
        keys, chosen = _smallest(torch.rand(len(tokens), generator=generators[site.name]), [new], count)
        if site.name in kept:
            old_keys, old = kept[site.name]
            keys, chosen = _smallest(torch.cat([old_keys, keys]), [old, chosen], count)
        kept[site.name] = keys, chosen
        return len(tokens)

    # The generators advance from batch to batch, so every process runs all batches.
    visit_site_inputs(replace(context, shard=Shard()), sites, visit, "token sample")
    return {name: sample for name, (_, sample) in kept.items()}


def _weights(context: SearchContext, site: Site, token_weights: TokenWeights | None) -> Iterator[Tensor]:
    """The weights of a site's tokens, batch by batch, if it has any."""
    if token_weights is None or site.part != "decoder" or site.expert:
        return
    batches = context.calibration.batches(context.loaded.processor, context.options.calibration_batch_size)
    for (inputs, _), weights in zip(batches, token_weights[site.block], strict=True):
        yield weights.cpu()[inputs["attention_mask"].bool()]


def _smallest(keys: Tensor, samples: Sequence[Sample], count: int) -> tuple[Tensor, Sample]:
    keys, index = keys.topk(min(count, len(keys)), largest=False)
    tokens = samples[0].tokens if len(samples) == 1 else torch.cat([sample.tokens for sample in samples])
    weights = torch.cat([sample.weights for sample in samples])
    return keys, Sample(tokens[index.to(tokens.device)].cpu(), weights[index])
