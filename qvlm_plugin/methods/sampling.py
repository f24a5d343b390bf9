"""A sample of the tokens that each site reads, small enough to keep for all sites at once."""

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
    """Tokens that a site reads.

    Attributes:
        tokens: [N, C] in the compute type, on the CPU.
        weights: how much their squared errors count, float32 [N].
    """

    tokens: Tensor
    weights: Tensor

    def weighted(self, device: torch.device) -> Tensor:
        """Tokens whose plain squared errors are the weighted ones of these: float32."""
        return (self.tokens.float() * self.weights.sqrt().unsqueeze(1)).to(device)


def sample_tokens(
    context: SearchContext, sites: Sequence[Site], count: int, token_weights: TokenWeights | None = None
) -> dict[str, Sample]:
    """Input tokens of each site, drawn evenly from the whole calibration set, answers included and padding left out.

    Every token gets a random key, and the tokens with the smallest keys stay: one pass, and the same draw for every
    batch size. The seed is that of the calibration set.

    Args:
        context: the search.
        sites: whose inputs to sample.
        count: tokens to keep of each site; all of them where there are fewer.
        token_weights: of the decoder's tokens; those of experts, and all others, weigh 1.

    Returns:
        For each site's name min(count, N) tokens.
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

    # The draw goes on from batch to batch: every process looks at all of them.
    visit_site_inputs(replace(context, shard=Shard()), sites, visit, "token sample")
    return {name: sample for name, (_, sample) in kept.items()}


def _weights(context: SearchContext, site: Site, token_weights: TokenWeights | None) -> Iterator[Tensor]:
    """Those of a site's tokens, batch by batch, if there are any."""
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
