"""Find the norm or Linear of a block that writes a site's input, so that scales of channels can be folded into it.

Candidates are tried: a candidate's channels are divided by random scales, the site's input is multiplied by them, and
the block's output must stay the same. It changes if an activation function lies between the two, if another module
reads the candidate's output, or if a norm multiplies by 1 + weight.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qvlm_plugin.methods.scaling import fold_of
from qvlm_plugin.plan import divide_channels
from qvlm_plugin.plan_header import Fold
from qvlm_plugin.topology import Site
from qvlm_plugin.tracing.runs import Call
from qvlm_plugin.tracing.skeleton import RandomProducts

_CLOSE, _APART = 1e-4, 1e-3
"""Differences relative to the largest element: up to the first it is rounding, above the second it is not."""


def producers(block: nn.Module, call: Call, sites: Sequence[Sequence[str]], order: Sequence[str]) -> list[str | None]:
    """The producer of each site; None if there is none. Of several, the one that is called last.

    Args:
        block: a block of a skeleton; it is left unchanged.
        call: one of its calls.
        sites: names of each site's Linears within the block.
        order: names of the block's modules, in the order of their first calls.
    """
    usual = _outputs(block, call)
    candidates = [name for name in reversed(order) if _can_be_folded_into(block.get_submodule(name))]
    effective = [name for name in candidates if not _equal(_outputs(block, call, scaled=name), usual, _APART)]
    found: list[str | None] = []
    for linears in sites:
        before = [name for name in effective if order.index(name) < order.index(linears[0]) and name not in linears]
        folds = ((name, _fold(block, name, linears)) for name in before)
        fitting = (
            name for name, fold in folds if fold and _equal(_outputs(block, call, name, (fold, linears)), usual, _CLOSE)
        )
        found.append(next(fitting, None))
    return found


def _can_be_folded_into(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(module, nn.Linear) or (weight is not None and weight.dim() == 1)


def _fold(block: nn.Module, producer: str, linears: Sequence[str]) -> Fold | None:
    """How scales of the producer's channels would reach the site; None if their numbers do not fit."""
    written, read = len(block.get_submodule(producer).weight), block.get_submodule(linears[0]).in_features
    owner = block.get_submodule(producer.rpartition(".")[0])
    head = written if written == read else getattr(owner, "head_dim", None)
    if not isinstance(head, int) or written % head or read % written:
        return None
    return fold_of(Site(linears[0], "", 0, tuple(linears), producer), block)


@torch.no_grad()
def _outputs(
    block: nn.Module, call: Call, scaled: str | None = None, undone: tuple[Fold, Sequence[str]] | None = None
) -> list[Tensor]:
    """The block's outputs; optionally with a module's channels divided by scales, and a site's input multiplied."""
    args, kwargs = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, call)
    with ExitStack() as stack, RandomProducts():
        if scaled is not None:
            module = block.get_submodule(scaled)
            scale = torch.rand(len(module.weight), generator=torch.Generator().manual_seed(2)) + 0.5
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(lambda _, args, output: output / scale).remove)
            else:
                stack.callback(module.load_state_dict, {k: v.clone() for k, v in module.state_dict().items()})
                divide_channels(module, scale)
        if undone is not None:
            fold, linears = undone
            columns = fold.spread(scale, block.get_submodule(linears[0]).in_features)
            for name in linears:
                linear = block.get_submodule(name)
                hook = linear.register_forward_pre_hook(lambda _, args, columns=columns: (args[0] * columns,))
                stack.callback(hook.remove)
        output = block(*args, **kwargs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _equal(outputs: Sequence[Tensor], usual: Sequence[Tensor], tolerance: float) -> bool:
    return all(
        float((one - other).abs().max()) <= tolerance * float(other.abs().max())
        for one, other in zip(outputs, usual, strict=True)
    )
