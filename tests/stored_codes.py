"""Plans that hold codes, which are not those that rounding to the nearest would find."""

from dataclasses import replace

import torch

from qvlm_plugin.formats import WeightFormat, stored_format
from qvlm_plugin.plan import replace_and_fold
from qvlm_plugin.quantizers import quantize_int, stored_parameters
from qvlm_plugin.rotation import factors, rotate
from qvlm_plugin.scheme import PARTS


def stored(weight_format, **more):
    """The format with its codes in the plan."""
    return WeightFormat.model_validate(stored_format(weight_format).model_dump() | more)


def other_integers(weight, weight_format, seed=0):
    """Integers near ``weight`` [O, I], but about two thirds of them one off the nearest."""
    fmt = weight_format
    nearest = quantize_int(weight, fmt)
    steps = torch.randint(-1, 2, weight.shape, generator=torch.Generator().manual_seed(seed))
    return replace(nearest, codes=(nearest.codes.int() + steps).clamp(0, 2**fmt.bits - 1).to(torch.uint8))


def other_parameters(weight, weight_format, seed=0):
    """What a plan holds of `other_integers`."""
    return stored_parameters(other_integers(weight, weight_format, seed), stored(weight_format))


def with_codes(plan, loaded, parts=PARTS):
    """``plan`` with codes for integer weights, and what they stand for by name; uses up the model's weights."""
    replace_and_fold(plan, dict(loaded.model.named_modules()))
    modules, tensors, values = [], dict(plan.tensors), {}
    for module in plan.modules:
        if module.weight.kind == "int" and module.part in parts:
            weight, rotation = loaded.model.get_submodule(module.name).weight.detach(), plan.rotation_of(module)
            integers = other_integers(rotate(weight, factors(rotation)) if rotation else weight, module.weight)
            module = module.model_copy(update={"weight": stored(module.weight)})
            tensors.pop(f"{module.name}/clip", None)
            for name, tensor in stored_parameters(integers, module.weight).items():
                tensors[f"{module.name}/{name}"] = tensor
            values[module.name] = integers.dequantize()
        modules.append(module)
    return replace(plan, modules=tuple(modules), tensors=tensors), values
