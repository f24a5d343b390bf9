"""A sample of the tokens that each site reads, small enough to keep for all sites at once."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.observe import visit_site_inputs
from qvlm_plugin.methods.shard import Shard
from qvlm_plugin.topology import Site


def sample_tokens(context: SearchContext, sites: Sequence[Site], count: int) -> dict[str, Tensor]:
    """Input tokens of each site, drawn evenly from the whole calibration set, answers included and padding left out.

    Every token gets a random key, and the tokens with the smallest keys stay: one pass, and the same draw for every
    batch size. The seed is that of the calibration set.

    Args:
        context: the search.
        sites: whose inputs to sample.
        count: tokens to keep of each site; all of them where there are fewer.

    Returns:
        For each site's name [min(count, N), C] in the compute type, on the CPU.
    """
    generators = {site.name: torch.Generator().manual_seed(context.calibration.seed) for site in sites}
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def visit(site: Site, tokens: Tensor) -> int:
        keys, chosen = _smallest(torch.rand(len(tokens), generator=generators[site.name]), tokens, count)
        chosen = chosen.cpu()
        if site.name in kept:
            old_keys, old = kept[site.name]
            keys, chosen = _smallest(torch.cat([old_keys, keys]), torch.cat([old, chosen]), count)
        kept[site.name] = keys, chosen
        return len(tokens)

    # The draw goes on from batch to batch: every process looks at all of them.
    visit_site_inputs(replace(context, shard=Shard()), sites, visit, "token sample")
    return {name: tokens for name, (_, tokens) in kept.items()}


def _smallest(keys: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    keys, index = keys.topk(min(count, len(keys)), largest=False)
    return keys, tokens[index.to(tokens.device)]
