"""Quantized modules that replace modules of the full-precision model temporarily during a search."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.models.placement import materialized, place_like
from qvlm_plugin.plan import RoundingPlan, quantized_linear, replace_and_fold
from qvlm_plugin.plan_header import ModulePlan


@dataclass(frozen=True, eq=False)
class Replacements:
    """Temporary replacements of modules and parameters, computed by a plan; the model itself is unchanged.

    Attributes:
        linears: quantized replacements of Linears, by name.
        values: new values of other modules' parameters, by name.
    """

    linears: Mapping[str, QuantLinear] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def within(self, prefix: str) -> "Replacements":
        """The same with names relative to the module ``prefix``, which must contain all of them."""
        length = len(prefix) + 1
        return Replacements(
            {name[length:]: layer for name, layer in self.linears.items()},
            {name[length:]: value for name, value in self.values.items()},
        )


def quantized_modules(
    plan: RoundingPlan, model: nn.Module, kernel: Kernel, paths: Sequence[str] = (), parking: ExitStack | None = None
) -> Replacements:
    """The replacements of all modules below ``paths``, or of the whole model if there are no paths.

    Args:
        plan: a plan for the model.
        model: the model in full precision.
        kernel: the arithmetic of the replacements.
        paths: attribute paths of parts of the model.
        parking: until it closes, the replaced weights are on the CPU; None leaves them on their device.
    """
    linears = {}
    for module in plan.quantized:
        if _inside(module.name, paths):
            linears[module.name] = quantized_module(plan, module, model, kernel)
            if parking is not None:
                parking.enter_context(_parked(model.get_submodule(module.name)))
    return Replacements(linears, changed_values(plan, model, paths))


def changed_values(
    plan: RoundingPlan, model: nn.Module, paths: Sequence[str] = (), without: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The parameters that the plan changes outside quantized Linears, by name.

    Args:
        plan, model, paths: see `quantized_modules`.
        without: paths below ``paths`` that are left out.
    """
    names = {module.name for module in plan.quantized}
    changed = {fold.producer for fold in plan.folds} | {name.rpartition(".")[0] for name in plan.replaced}
    return {
        f"{name}.{key}": value.detach()
        for name in sorted(changed - names)
        if _inside(name, paths) and not (without and _inside(name, without))
        for key, value in updated_module(plan, model, name).named_parameters()
    }


def _inside(name: str, paths: Sequence[str]) -> bool:
    return not paths or any(f"{name}.".startswith(f"{path}.") for path in paths)


def quantized_module(plan: RoundingPlan, module: ModulePlan, model: nn.Module, kernel: Kernel) -> QuantLinear:
    """The quantized replacement of a Linear by its entry in the plan; on the Linear's device, or offloaded like it."""
    linear = model.get_submodule(module.name)
    with materialized(linear):
        own = updated_module(plan, model, module.name)
        layer = quantized_linear(module, own, plan.tensors, kernel, plan.rotation_of(module))
    place_like(layer, linear)
    return layer


@contextmanager
def _parked(linear: nn.Module) -> Iterator[None]:
    """While active, the Linear's weight is on the CPU, unless it is offloaded anyway."""
    weight, device = linear.weight, linear.weight.device
    if weight.is_meta or device.type == "cpu":
        yield
        return
    weight.data = weight.data.cpu()
    try:
        yield
    finally:
        weight.data = weight.data.to(device)


def updated_module(plan: RoundingPlan, model: nn.Module, name: str) -> nn.Module:
    """A copy of a module with the plan's folds and new values; the module itself if none of them concerns it."""
    site = next((module.site for module in plan.modules if module.name == name), "")
    folded = any(name == fold.producer or site == fold.site for fold in plan.folds)
    module = model.get_submodule(name)
    if not folded and not any(value.rpartition(".")[0] == name for value in plan.replaced):
        return module
    module = copied(module)
    replace_and_fold(plan, {name: module})
    return module


def copied(module: nn.Module) -> nn.Module:
    """A copy of a Linear or norm whose weights can be changed, on the device where ``module`` runs."""
    # A deep copy would include accelerate's hook, which refers to the offloaded weights of the whole model.
    twin = copy.copy(module)
    with materialized(module):
        twin._parameters = copy.deepcopy(module._parameters)
    return twin


@contextmanager
def replaced(model: nn.Module, other: Replacements) -> Iterator[None]:
    """While active, the replacements replace modules and parameter values of ``model``."""
    originals = {name: model.get_submodule(name) for name in other.linears}
    with ExitStack() as stack:
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in other.values):
            stack.enter_context(materialized(model.get_submodule(owner)))
        kept = {name: model.get_parameter(name).detach().clone() for name in other.values}
        try:
            _put(model, other.linears, other.values)
            yield
        finally:
            _put(model, originals, kept)


@contextmanager
def other_forward(
    modules: Sequence[nn.Module], other: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """While active, ``other(index, forward)`` replaces the ``forward`` of each module."""
    own: list[Any] = [vars(module).get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = other(index, module.forward)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


@torch.no_grad()
def _put(model: nn.Module, modules: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)
    for name, value in values.items():
        model.get_parameter(name).copy_(value)
