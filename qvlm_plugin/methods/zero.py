"""``zero_on_grid``: shift static channel ranges so that 0 is a rounding point."""

from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.quantizers import through_zero


def put_zero_on_grids(context: SearchContext, draft: Draft) -> Draft:
    """Replace the bounds of every static site by `through_zero`."""
    moved = {}
    for site, fmt in context.activation_sites.items():
        keys = [f"{site.name}/{name}" for name in ("lower", "upper")]
        if fmt.kind == "static_channel" and keys[0] in draft.tensors:
            bounds = through_zero(*(draft.tensors[key] for key in keys), fmt.bits)
            moved |= dict(zip(keys, bounds, strict=True))
    return draft.adding(moved)
