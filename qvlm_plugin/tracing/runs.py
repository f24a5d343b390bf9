"""Runs of a model: which modules are called, in which order, and which Linears read the same tensor."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qvlm_plugin.tracing.skeleton import RandomProducts

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and keyword arguments of a module's call."""


@dataclass(frozen=True, eq=False)
class Run:
    """One forward pass.

    Attributes:
        order: the rank of each module's first call, by its full name; modules that were not called are left out.
        reads: for each Linear that was called, the numbers of the tensors that it read, one for each call. Within a
            block, equal numbers mean equal tensors.
        calls: the first call of each module in ``kept_calls``.
        routed: members of ModuleLists that were called as ``expert(tokens, rows)``.
    """

    order: dict[str, int] = field(default_factory=dict)
    reads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    routed: set[str] = field(default_factory=set)


@torch.no_grad()
def record_run(
    model: nn.Module, inputs: Mapping[str, Any], blocks: Collection[str], kept_calls: Collection[str] = ()
) -> Run:
    """Run the skeleton, and record what is called.

    Args:
        model: see `skeleton`.
        inputs: the inputs of one batch.
        blocks: full names of blocks. Tensors are compared within a block, and released when it ends.
        kept_calls: full names of modules of which to keep the first call.
    """
    run, seen = Run(), _Tensors()
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    listed = {f"{name}.{index}" for name, members in lists.items() for index in range(len(members))}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
        run.order.setdefault(name, len(run.order))
        if isinstance(module, nn.Linear):
            read = args[0] if args else kwargs["input"]
            run.reads[name] = (*run.reads.get(name, ()), seen.number(read))
        if name in listed and len(args) == 2 and isinstance(args[1], Tensor) and args[1].dtype == torch.int64:
            run.routed.add(name)
        if name in kept_calls:
            run.calls.setdefault(name, (args, kwargs))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: note(module, args, kwargs, name), with_kwargs=True
            )
            stack.callback(hook.remove)
        for name in blocks:
            hook = model.get_submodule(name).register_forward_hook(lambda *_: seen.held.clear())
            stack.callback(hook.remove)
        with RandomProducts():
            model(**inputs, use_cache=False)
    return run


class _Tensors:
    """Numbers tensors in the order in which they are seen; the same memory keeps its number in any Python object."""

    def __init__(self) -> None:
        self.held: list[tuple[Tensor, int]] = []
        self._count = 0

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor."""
        for other, number in self.held:
            if _identity(other) == _identity(tensor):
                return number
        self._count += 1
        self.held.append((tensor, self._count))
        return self._count


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version


@torch.no_grad()
def logits_with(model: nn.Module, inputs: Mapping[str, Any], changed: Iterable[nn.Module] = ()) -> Tensor:
    """The skeleton's logits when the outputs of some modules are multiplied by random factors."""
    with ExitStack() as stack, RandomProducts():
        for module in changed:
            # Before transformers' own hooks, which collect hidden states.
            hook = module.register_forward_hook(lambda _, args, output: tree_map(_changed, output), prepend=True)
            stack.callback(hook.remove)
        return model(**inputs, use_cache=False).logits


def _changed(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value * (torch.rand(value.shape, generator=torch.Generator().manual_seed(1)) + 0.5)


def affects(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[Iterable[nn.Module]], bool]:
    """A function that tells whether the logits depend on the outputs of modules."""
    usual = logits_with(model, inputs)
    return lambda modules: not torch.equal(logits_with(model, inputs, modules), usual)
