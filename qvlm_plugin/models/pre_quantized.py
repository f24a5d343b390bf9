"""Checkpoints that other programs quantized: check and correct their ``quantization_config`` before loading weights.

transformers runs them with its own quantizers, most of which need another package. This module finds out which package
that is, and corrects names in the configuration that do not match the model or the weight files.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from rich.console import Console
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.placement import empty_model
from qvlm_plugin.reading import one_line

OWN = "qvlm"
"""The ``quant_method`` of this package's own checkpoints."""

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "awq": ("gptqmodel>=5.0",),
    "gptq": ("gptqmodel>=5.0", "optimum>=1.24"),
    "auto-round": ("auto-round>=0.5",),
    "bitsandbytes": ("bitsandbytes>=0.46.1",),
    "compressed-tensors": ("compressed-tensors>=0.15",),
}
"""Packages that a quantizer of transformers needs, by ``quant_method``; other quantizers name theirs in an error."""

EXTRAS: Mapping[str, str] = {
    "awq": "gptq", "gptq": "gptq", "auto-round": "auto-round", "bitsandbytes": "nf",
    "compressed-tensors": "compressed-tensors",
}  # fmt: skip
"""The extra of this package that installs these packages, by ``quant_method``."""

_UNCONVERTED: Mapping[str | None, tuple[str, tuple[str, ...]]] = {
    "awq": ("modules_to_not_convert", (".qweight",)),
    "bitsandbytes": ("llm_int8_skip_modules", (".weight.absmax", ".SCB")),
}
"""By ``quant_method``: the option that lists modules that are not quantized, and the suffixes of the keys that weight
files have for quantized Linears."""

_REGEX = "re:"


def foreign_method(config: PretrainedConfig) -> str | None:
    """The ``quant_method`` of a checkpoint that another program quantized; None for all others."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    values = stored if isinstance(stored, Mapping) else stored.to_dict()
    method = values.get("quant_method") or ("bitsandbytes" if _has_bits(values) else "not named")
    method = str(getattr(method, "value", method))
    return None if method == OWN else method


def check_quantizer(config: PretrainedConfig, source: str) -> None:
    """Check that transformers can run a checkpoint that another program quantized, before its weights are read.

    Args:
        config: of the model.
        source: what named it, for messages.

    Raises:
        QVLMError: transformers has no quantizer for it, a package is missing or too old, the quantizer refuses the
            configuration, or the checkpoint needs its inputs transformed, which transformers does not do.
    """
    method = foreign_method(config)
    if method is None:
        return
    names = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING}
    if method not in names:
        raise QVLMError(
            f"{source}: its quantization_config has quant_method={method!r}, which transformers cannot run; it can run "
            f"{', '.join(sorted(names - {OWN, 'qvlm-plan'}))}"
        )
    stored = config.quantization_config
    if isinstance(stored, Mapping) and (stored.get("transform_config") or {}).get("config_groups"):
        raise QVLMError(
            f"{source}: its quantization_config has a transform_config, which transformers ignores, so answers would "
            "be wrong; run it with vLLM"
        )
    for wanted in PACKAGES.get(method, ()):
        _require_package(wanted, method, source)
    try:
        quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except Exception as error:
        raise QVLMError(f"{source}: quantized by {method}, which cannot be run here: {one_line(error)}") from error


def _has_bits(values: Mapping[str, Any]) -> bool:
    return bool(values.get("load_in_4bit") or values.get("load_in_8bit"))


def _require_package(wanted: str, method: str, source: str) -> None:
    name, _, least = wanted.partition(">=")
    try:
        found = version(name)
    except PackageNotFoundError:
        found = None
    if found is None or Version(found) < Version(least):
        there = "is not installed" if found is None else f"here is {found}"
        raise QVLMError(f"{source}: quantized by {method}, which needs {name} {least} or newer, but {name} {there}: "
                        f"pip install '{wanted}', or the extra qvlm_plugin[{EXTRAS[method]}]")  # fmt: skip


def correct_ignored(config: PretrainedConfig, source: str) -> None:
    """Replace names of weights in files under ``ignore`` by the names of the model's modules.

    llm-compressor writes the names that weights have in files (``vision_tower.…``). transformers renames weights when
    it reads them (``model.vision_tower.…``), but does not rename what is ignored.

    Args:
        config: of the model; its ``quantization_config`` is changed.
        source: what named it, for the log.
    """
    if not (unknown := _unknown_ignored(config)):
        return
    model = empty_model(config)
    modules, changes, changed = dict(model.named_modules()), _renames(model), {}
    for name in unknown:
        for candidate in (_renamed(name, changes), f"{model.base_model_prefix}.{name}"):
            if candidate in modules:
                changed.setdefault(name, candidate)
    if changed:
        stored = config.quantization_config
        stored["ignore"] = [changed.get(name, name) for name in stored["ignore"]]
        old, new = next(iter(changed.items()))
        _log(f"{source}: {len(changed)} names that its quantization_config ignores are those of weight files, and were "
             f"replaced by the model's, for example {old} by {new}")  # fmt: skip


def correct_blocks(config: PretrainedConfig) -> None:
    """Replace an older module name in AutoRound's ``block_name_to_quantize`` by the model's name."""
    stored = getattr(config, "quantization_config", None)
    if foreign_method(config) is None or not isinstance(stored, dict) or not stored.get("block_name_to_quantize"):
        return
    modules = {name for name, _ in empty_model(config).named_modules()}
    given = stored["block_name_to_quantize"]
    names = given.split(",") if isinstance(given, str) else given
    moved = [name.strip().replace("language_model.model.", "model.language_model.") for name in names]
    if all(name in modules for name in moved):
        stored["block_name_to_quantize"] = ",".join(moved) if isinstance(given, str) else moved


def correct_unconverted(config: PretrainedConfig, files: Iterable[Path], trust_remote_code: bool, source: str) -> None:
    """List the Linears that are not quantized according to the weight files, if the configuration lists others.

    transformers converts every Linear that is not listed. In AWQ's format, GPTQModel lists none, and AutoRound also
    lists those that it quantized. Older versions of transformers wrote other names (``visual`` for ``model.visual``).

    Args:
        config: of the model; its ``quantization_config`` is changed.
        files: the weights, of which only the names are read.
        trust_remote_code: whether code that comes with the checkpoint may run.
        source: what named it, for messages.

    Raises:
        QVLMError: the files hold no quantized weight.
    """
    stored = getattr(config, "quantization_config", None)
    option, marks = _UNCONVERTED.get(foreign_method(config), ("", ()))
    if not option or not isinstance(stored, dict):
        return
    model = empty_model(config, trust_remote_code)
    changes, quantized = _renames(model), set()
    for file in files:
        with safe_open(file, "pt") as content:
            keys = [key for key in content.keys() if key.endswith(marks)]  # noqa: SIM118
        for mark in marks:
            quantized |= {_renamed(key.removesuffix(mark), changes) for key in keys if key.endswith(mark)}
    if not quantized:
        raise QVLMError(
            f"{source}: its quantization_config has quant_method={foreign_method(config)!r}, but its files hold no "
            f"weight quantized by it (no name ends in {' or '.join(marks)}); correct the one or the other"
        )
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = [*(stored.get(option) or []), *get_keys_to_not_convert(model)]
    converted = {name for name in linears if should_convert_module(name, left)}
    if quantized <= linears and quantized != converted:
        stored[option] = sorted(linears - quantized)
        _log(f"{source}: {option} in its quantization_config does not fit its files, and was replaced by the names of "
             f"the {len(stored[option])} Linears that the files do not quantize")  # fmt: skip


def read_packed_zero_points(config: PretrainedConfig) -> None:
    """Make transformers read packed weights with zero points; it dequantizes them, as it does those without.

    transformers expects zero points of shape [rows, groups], which compressed-tensors packs into fewer rows of int32.
    So its quantizer is replaced, in this process, by one that expects packed zero points.
    """
    stored = getattr(config, "quantization_config", None)
    if foreign_method(config) == "compressed-tensors" and isinstance(stored, dict):
        groups = [group for group in stored.get("config_groups", {}).values() if isinstance(group, dict)]
        if any((group.get("weights") or {}).get("symmetric") is False for group in groups):
            AUTO_QUANTIZER_MAPPING["compressed-tensors"] = _PackedZeroPoints


class _PackedZeroPoints(CompressedTensorsHfQuantizer):
    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        for module in model.modules():
            zero_points = getattr(module, "weight_zero_point", None)
            if zero_points is None or zero_points.dtype == torch.int32 or not hasattr(module, "weight_packed"):
                continue
            rows, groups = zero_points.shape
            in_a_word = 32 // module.quantization_scheme.weights.num_bits
            packed = zero_points.new_empty(-(-rows // in_a_word), groups, dtype=torch.int32)
            module.weight_zero_point = nn.Parameter(packed, requires_grad=False)


def note_schemes(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Record at each dequantized Linear the scheme of its stored weight, which transformers does not keep.

    Args:
        model: loaded.
        config: that it was loaded by.
    """
    stored = getattr(config, "quantization_config", None)
    if foreign_method(config) == "compressed-tensors" and isinstance(stored, dict) and stored.get("dequantize"):
        from compressed_tensors.quantization import QuantizationScheme
        from compressed_tensors.utils.match import match_named_modules

        for group in stored["config_groups"].values():
            scheme = QuantizationScheme.model_validate(group)
            for _, module in match_named_modules(model, scheme.targets, stored.get("ignore")):
                module.quantization_scheme = scheme
        model.config.quantization_config = stored


def loading_hint(config: PretrainedConfig) -> str:
    """The likely cause of a failure to load, for the end of an error message; empty if none is known."""
    if not (unknown := _unknown_ignored(config)):
        return ""
    return f" (its quantization_config ignores {len(unknown)} names that no module has, for example {unknown[0]})"


def _log(line: str) -> None:
    Console(stderr=True).print(line, markup=False, soft_wrap=True)


def _unknown_ignored(config: PretrainedConfig) -> list[str]:
    """Names under ``ignore`` that are neither those of a module or a class of modules, nor regular expressions."""
    stored = getattr(config, "quantization_config", None)
    if foreign_method(config) is None or not isinstance(stored, dict) or not stored.get("ignore"):
        return []
    model = empty_model(config)
    known = {name for name, _ in model.named_modules()} | {_kind(module) for module in model.modules()}
    return [name for name in stored["ignore"] if not (name.startswith(_REGEX) or name in known)]


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _renames(model: PreTrainedModel) -> list[WeightRenaming]:
    return [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]


def _renamed(name: str, changes: list[WeightRenaming]) -> str:
    """What transformers calls a module whose weight in a file has this name."""
    key = f"{name}.weight"
    for change in changes:
        key, _ = change.rename_source_key(key)
    return key.removesuffix(".weight")
