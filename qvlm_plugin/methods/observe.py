"""Run calibration data through a model and observe the inputs of its Linears."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from qvlm_plugin.conversation import to_device
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft, transformed
from qvlm_plugin.methods.shard import OrderedSum
from qvlm_plugin.topology import Site

Found = TypeVar("Found")


@torch.inference_mode()
def visit_site_inputs(
    context: SearchContext,
    sites: Sequence[Site],
    visit: Callable[[Site, Tensor], Found],
    description: str,
    draft: Draft | None = None,
) -> dict[Site, Found]:
    """Call ``visit(site, tokens)`` for every batch, with the input of each site as tokens [N, C] without padding.

    Args:
        context: the search; its model runs in full precision, on prompts with answers, so that inputs are also those
            of decoding.
        sites: the sites to observe.
        visit: called in the order of the computation; not for an expert that processes no token of the batch. Its
            results are summed with ``+``.
        description: label of the progress display.
        draft: the draft whose transforms are applied to the inputs; None applies none.

    Returns:
        The sum over the batches of what ``visit`` returns, by site.

    Raises:
        QVLMError: an input is not finite; the message names the site.
    """
    model, draft, sums = context.model, draft or Draft(), OrderedSum(context.shard)

    def look(site: Site, x: Tensor, mask: Tensor) -> None:
        tokens = x[mask]
        if not tokens.isfinite().all():
            raise QVLMError(f"the input of {site.name} is not finite on calibration data; try dtype=float32")
        found[site] = visit(site, transformed(draft, site, tokens))

    for inputs, _ in context.batches(description):
        found: dict[Site, Found] = {}
        with watching(model, sites, inputs["attention_mask"].bool(), look):
            model(**to_device(inputs, context.device, model.dtype), use_cache=False, logits_to_keep=1)
        sums.add(found)
    return sums.total()


@contextmanager
def watching(
    module: nn.Module,
    sites: Sequence[Site],
    attended: Tensor,
    look: Callable[[Site, Tensor, Tensor], None],
    prefix: str = "",
) -> Iterator[None]:
    """While active, every forward pass of ``module`` passes the inputs of its sites to ``look``.

    Args:
        module: a model, or a part of it.
        sites: sites in the module.
        attended: bool [B, T] of the batch, false at padding.
        look: called as ``look(site, x, mask)`` with the site's input, and a bool mask over all but its last dimension
            that is false at padding, also at padding routed to an expert; not called for an input of padding only.
        prefix: the part of the sites' full names that precedes names within the module.
    """
    rows: dict[str, Tensor] = {}

    def note(expert: str, module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        rows[expert] = args[1]

    def show(site: Site, module: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0]
        if site.part != "decoder":
            mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        else:
            mask = attended.to(x.device)
            mask = mask if site.expert is None else mask.flatten()[rows[site.expert]]
        if mask.any():
            look(site, x, mask)

    def part(name: str) -> nn.Module:
        return module.get_submodule(name.removeprefix(prefix))

    experts = dict.fromkeys(site.expert for site in sites if site.expert)
    handles = [part(expert).register_forward_pre_hook(partial(note, expert)) for expert in experts]
    handles += [part(site.name).register_forward_pre_hook(partial(show, site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
