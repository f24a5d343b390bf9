"""Prepare the model of an evaluation: check and load it, and quantize it by a new or saved plan if it is not yet."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from loguru import logger
from transformers import PretrainedConfig

from qvlm_plugin import backends, planning, plugins
from qvlm_plugin.calibration import CalibrationSet, check_sources
from qvlm_plugin.checkpoint import CheckpointRecord
from qvlm_plugin.demo import resolve_demo
from qvlm_plugin.harness import processes
from qvlm_plugin.harness.arguments import ModelArguments, check_stored
from qvlm_plugin.harness.model_size import on_gpu
from qvlm_plugin.harness.provenance import versions
from qvlm_plugin.hf_quantizer import QUANT_METHOD, QVLMHfQuantizer, quantizer_of
from qvlm_plugin.kernels.selection import Execution
from qvlm_plugin.memory import peak_memory
from qvlm_plugin.models.decoding import check_compilation, compile_decoding, ignored_settings, plain_config
from qvlm_plugin.models.loading import Checkpoint, LoadedModel, load_weights, open_checkpoint
from qvlm_plugin.models.placement import device_name, execution_device
from qvlm_plugin.models.pre_quantized import foreign_method
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.plan_request import check_calibration, check_request
from qvlm_plugin.quantized_loading import QuantizeOnLoad
from qvlm_plugin.source import source_commit
from qvlm_plugin.stored_bits import stored_facts, stored_kernels
from qvlm_plugin.tracing.trace import traced

ReadCalibration = Callable[[], CalibrationSet]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model that is ready to answer.

    Attributes:
        loaded: the model and its processor.
        facts: facts about the model, its quantization and this machine, for the results; JSON values.
        calibration_digests: content digests of the calibration documents, if known.
    """

    loaded: LoadedModel
    facts: Mapping[str, Any]
    calibration_digests: frozenset[str] = frozenset()


def prepare_model(arguments: ModelArguments, device: torch.device, read: ReadCalibration) -> Prepared:
    """Load and quantize the model that the arguments name. Cheap checks come first.

    Args:
        arguments: the model's arguments.
        device: this process's device.
        read: reads the calibration samples that the arguments name.

    Raises:
        QVLMError: an argument is not allowed, or names something unusable.
    """
    request, plan, calibration, quantize = None, None, None, None
    if arguments.plan is not None:
        plan = RoundingPlan.load(arguments.plan)
    else:
        request = check_request(arguments.method, arguments.scheme, arguments.options)
    draws = request is not None and request.needs_calibration and arguments.calibration
    if draws:
        check_sources(arguments.calibration)
    checkpoint = _open(arguments, device)
    if draws:
        with processes.first_process_first():
            calibration = read()
    if request is not None:
        check_calibration(request, calibration)
    if plan is not None and arguments.backend != "reference" and arguments.device_map is None:
        quantize = QuantizeOnLoad(plan, backends.kernels(arguments.backend), arguments.strict)
    loaded = load_weights(
        checkpoint,
        dtype=arguments.dtype,
        device=device,
        device_map=arguments.device_map,
        attn_implementation=arguments.attn_implementation,
        quantize=quantize,
    )
    stored, foreign = quantizer_of(loaded.model), foreign_method(loaded.model.config)
    if foreign is not None:
        facts, digests = _as_stored_by_others(arguments, loaded, foreign), ()
    elif stored is not None:
        facts, digests = _as_stored(arguments, stored), stored.record.calibration_digests
    else:
        if request is not None:
            plan = planning.obtain_plan(loaded, request, calibration, arguments.cache)
        facts = _by_plan(arguments, loaded, plan, quantize)
        digests = plan.calibration.digests if plan.calibration else ()
    searched = (facts["calibration"] or {}).get("conv")
    if warning := planning.prompt_warning(searched, loaded):
        _warn(warning)
    return Prepared(loaded, facts | _facts(arguments, loaded) | _decoding(arguments, loaded), frozenset(digests))


def _open(arguments: ModelArguments, device: torch.device) -> Checkpoint:
    with processes.first_process_first():  # the first process may have to build the demo model
        pretrained = resolve_demo(arguments.pretrained)
    checkpoint = open_checkpoint(
        pretrained,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        conv=arguments.conv,
        router_noise_seed=arguments.router_noise_seed,
        image_aspect_ratio=arguments.image_aspect_ratio,
        check_config=partial(_check_config, arguments, device),
    )
    needed = arguments.topology == "traced" and _needs_topology(arguments, checkpoint.config)
    return traced(checkpoint) if needed else checkpoint


def _check_config(arguments: ModelArguments, device: torch.device, config: PretrainedConfig) -> None:
    """Check the arguments against the model's configuration, before weights are loaded."""
    if arguments.compile:
        check_compilation(config, device, arguments.trust_remote_code)
    if arguments.topology == "described" and _needs_topology(arguments, config):
        plugins.topology(config)
    if _is_exported(config):
        check_stored(arguments, CheckpointRecord.read(config.quantization_config).backend)
    elif (foreign := foreign_method(config)) is not None:
        check_stored(arguments, foreign)


def _needs_topology(arguments: ModelArguments, config: PretrainedConfig) -> bool:
    """Whether the model's parts must be found: a saved plan or an exported checkpoint lists them."""
    return arguments.plan is None and not _is_exported(config)


def _is_exported(config: PretrainedConfig) -> bool:
    stored = getattr(config, "quantization_config", None)
    return stored is not None and stored.get("quant_method") == QUANT_METHOD


def _as_stored_by_others(arguments: ModelArguments, loaded: LoadedModel, method: str) -> dict[str, Any]:
    """Facts about a checkpoint that another program quantized."""
    _warn(
        f"pretrained={arguments.pretrained!r}: quantized by {method} with unknown calibration samples; "
        "they may include evaluated documents"
    )
    return {
        **stored_facts(loaded.model, plugins.topology_of(loaded), method),
        "plan_hash": loaded.fingerprint,
        "backend": method,
        "quantized_from": None,
        "kernels": stored_kernels(loaded.model),
        "fallbacks": 0,
    }


def _as_stored(arguments: ModelArguments, stored: QVLMHfQuantizer) -> dict[str, Any]:
    """Facts about a checkpoint that this package exported."""
    record = stored.record
    if arguments.strict:
        stored.execution.require_no_fallback()
    return {**record.plan, "backend": record.backend, "quantized_from": record.model} | _kernels(
        stored.execution, record.backend
    )


def _by_plan(
    arguments: ModelArguments, loaded: LoadedModel, plan: RoundingPlan, quantize: QuantizeOnLoad | None
) -> dict[str, Any]:
    """Apply a plan, unless the model was quantized while it was loaded; returns facts about the plan."""
    if quantize is None:
        execution = planning.apply(plan, loaded, arguments.backend, arguments.strict)
    else:
        execution = quantize.execution
        plugins.notify_quantized(loaded, plan)
    return {**plan.facts, "backend": arguments.backend, "quantized_from": None} | _kernels(execution, arguments.backend)


def _kernels(execution: Execution, backend: str) -> dict[str, Any]:
    if processes.rank() == 0 and execution.choices:
        logger.info(f"backend={backend}: {execution}")
    return {"kernels": execution.counts, "fallbacks": len(execution.fallbacks)}


def _decoding(arguments: ModelArguments, loaded: LoadedModel) -> dict[str, Any]:
    """Drop the checkpoint's decoding settings, and compile decoding if requested; returns facts about both."""
    model = loaded.model
    if ignored := ignored_settings(model.generation_config):
        settings = ", ".join(f"{name}={value}" for name, value in ignored.items())
        _warn(f"ignoring {settings} of generation_config.json; set them with --gen_kwargs if needed")
    model.generation_config = plain_config(model.generation_config)
    if arguments.compile:
        compile_decoding(model)
    return {"generation_config_ignored": ignored, "compile": arguments.compile}


def _facts(arguments: ModelArguments, loaded: LoadedModel) -> dict[str, Any]:
    return {
        "pretrained": arguments.pretrained,
        "revision": arguments.revision,
        "model_fingerprint": loaded.fingerprint,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": device_name(execution_device(loaded.model)),
        "attn_implementation": loaded.model.config._attn_implementation,
        "image_processor": type(loaded.processor.image_processor).__name__,
        "conv": loaded.conv,
        "context_length": loaded.context,
        "router_noise_seed": arguments.router_noise_seed,
        "image_aspect_ratio": arguments.image_aspect_ratio,
        "eos_token_id": loaded.model.generation_config.eos_token_id,
        "versions": versions(),
        "commit": source_commit(),
        # Recorded separately, because the next run finds the plan in the cache and needs less.
        "preparation_peak_bytes": peak_memory(on_gpu(loaded.model)),
    }


def _warn(message: str) -> None:
    if processes.rank() == 0:
        logger.warning(message)
