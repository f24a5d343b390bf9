"""The bits of a checkpoint that another program quantized, read from the modules that its quantizer created.

transformers' quantizers replace Linears by their own modules, or keep Linears and note their scheme. Stored bits are
counted: codes, 16-bit scales and zero points, as `formats` counts them for this package's own weights.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.models.placement import empty_model
from qvlm_plugin.scheme import PARTS, UNQUANTIZED
from qvlm_plugin.topology import ORDER, Topology, resolve

UNKNOWN = "unknown"
"""The recorded source of the calibration samples of another program."""

_SCALE_BITS = 16

Shape = tuple[int, int]
"""Shape of a weight: [out_features, in_features]."""


@dataclass(frozen=True)
class StoredLinear:
    """A Linear as stored by a quantizer of transformers.

    Attributes:
        weight: bits of a weight, including its share of scales and zero points.
        bits: bits of a code alone; 16 if the weight is not quantized.
        activation: bits of an input's element in the product; 16 if inputs are not rounded.
        shape: shape of the weight.
        kernel: name of the kernel that computes the product.
    """

    weight: float
    bits: int
    activation: int
    shape: Shape
    kernel: str

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def stored_linear(module: nn.Module) -> StoredLinear | None:
    """What a module stores; None if it is neither a Linear nor the replacement of one."""
    for read in _READERS:
        if (found := read(module)) is not None:
            return found
    return None


def stored_linears(model: nn.Module) -> dict[str, StoredLinear]:
    """The stored Linears of a model, by the names of their modules."""
    return {name: found for name, module in model.named_modules() if (found := stored_linear(module)) is not None}


def stored_facts(model: PreTrainedModel, topology: Topology, method: str) -> dict[str, Any]:
    """Facts about a model that another program quantized, with the keys of a plan's facts.

    Args:
        model: the model with its weights.
        topology: its topology.
        method: the ``quant_method`` of its configuration.
    """
    linears = stored_linears(model)
    part_of = _parts(model, topology)
    by_part: dict[str, list[StoredLinear]] = {}
    for name, linear in linears.items():
        by_part.setdefault(part_of(name), []).append(linear)
    table = [(name, part_of(name), asdict(linear)) for name, linear in linears.items()]
    content = model.config.quantization_config
    content = content if isinstance(content, Mapping) else content.to_dict()
    return {
        "method": f"{method} checkpoint",
        "scheme": _scheme(by_part),
        "options": {name: value for name, value in content.items() if isinstance(value, bool | int)},
        "bits": {
            part: {"weight": _mean(by_part[part], "weight"), "activation": _mean(by_part[part], "activation")}
            for part in (*PARTS, "unused", "other")
            if part in by_part
        },
        "table_hash": hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest(),
        "calibration": {"source": UNKNOWN, "seed": None, "documents": None, "conv": None, "over_context": None},
        "uncalibrated_expert_inputs": 0,
        "search_seconds": 0.0,
    }


def stored_kernels(model: nn.Module) -> dict[str, int]:
    """How many quantized modules each kernel runs."""
    quantized = [linear for linear in stored_linears(model).values() if linear.bits < UNQUANTIZED]
    return dict(Counter(linear.kernel for linear in quantized).most_common())


def _mean(linears: list[StoredLinear], attribute: str) -> float:
    """The mean of an attribute over all weights."""
    return sum(getattr(linear, attribute) * linear.elements for linear in linears) / sum(
        linear.elements for linear in linears
    )


def _scheme(by_part: Mapping[str, list[StoredLinear]]) -> str:
    """The widths that most weights of each part have, as schemes are written."""
    widths = {}
    for part in (part for part in PARTS if part in by_part):
        counts: Counter[str] = Counter()
        for linear in by_part[part]:
            counts[f"w{linear.bits}a{linear.activation}"] += linear.elements
        widths[part] = counts.most_common(1)[0][0]
    decoder = widths.pop("decoder")
    return "+".join([decoder, *(f"{part}:{width}" for part, width in sorted(widths.items()) if width != decoder)])


def _parts(model: PreTrainedModel, topology: Topology) -> Callable[[str], str]:
    """A function that gives the part of a Linear by its name, as in plans."""
    sites = {name: site.part for site in resolve(topology, empty_model(model.config)) for name in site.linears}
    paths = tuple(f"{path}." for part in ORDER for path in topology.paths(part))
    return lambda name: sites.get(name) or ("unused" if name.startswith(paths) else "other")


# Readers of the modules that quantizers create.


def _compressed_tensors(module: nn.Module) -> StoredLinear | None:
    """A Linear with a scheme, whose weight compressed-tensors dequantizes before it runs."""
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None or scheme.weights is None or not hasattr(module, "in_features"):
        return None
    shape, weights, inputs = _shape(module), scheme.weights, scheme.input_activations
    groups = _groups(str(getattr(weights.strategy, "value", weights.strategy)), weights, shape)
    scales = groups * (_SCALE_BITS + (0 if weights.symmetric else weights.num_bits))
    activation = UNQUANTIZED if inputs is None else inputs.num_bits
    bits = weights.num_bits + scales / math.prod(shape)
    return StoredLinear(bits, weights.num_bits, activation, shape, "compressed-tensors, dequantized")


def _groups(strategy: str, weights: Any, shape: Shape) -> int:
    """How many scales a weight has under one of the strategies of compressed-tensors."""
    rows, columns = shape
    match strategy:
        case "tensor":
            return 1
        case "channel":
            return rows
        case "block":
            height, width = weights.block_structure
            return math.ceil(rows / height) * math.ceil(columns / width)
    return rows * math.ceil(columns / weights.group_size)


def _bitsandbytes(module: nn.Module) -> StoredLinear | None:
    """NF4, FP4 or LLM.int8()."""
    weight = getattr(module, "weight", None)
    kernel = f"bitsandbytes {type(module).__name__}"
    if (state := getattr(weight, "quant_state", None)) is not None:
        scale = 8 + 32 / state.state2.blocksize if state.nested else 32
        return StoredLinear(4 + scale / state.blocksize, 4, UNQUANTIZED, tuple(state.shape), kernel)
    if type(weight).__name__ == "Int8Params":
        shape = _shape(module)
        return StoredLinear(8 + 32 / shape[1], 8, 8, shape, kernel)
    return None


def _packed_words(module: nn.Module) -> StoredLinear | None:
    """Codes in integer words with scales and zero points: the layouts of GPTQ, AWQ and AutoRound."""
    bits = getattr(module, "bits", None)
    if not isinstance(bits, int) or not hasattr(module, "group_size") or (shape := _shape(module)) is None:
        return None
    group_size = module.group_size if 0 < module.group_size < shape[1] else None
    stored = WeightFormat(kind="int", bits=bits, group_size=group_size, symmetric=False)
    kernel = f"{type(module).__module__.partition('.')[0]} {type(module).__name__}"
    return StoredLinear(stored.effective_bits(shape), bits, UNQUANTIZED, shape, kernel)


def _plain(module: nn.Module) -> StoredLinear | None:
    if not isinstance(module, nn.Linear):
        return None
    return StoredLinear(UNQUANTIZED, UNQUANTIZED, UNQUANTIZED, _shape(module), "torch Linear")


def _shape(module: nn.Module) -> Shape | None:
    for outputs, inputs in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        if hasattr(module, outputs):
            return getattr(module, outputs), getattr(module, inputs)
    return None


_READERS = (_compressed_tensors, _bitsandbytes, _packed_words, _plain)
