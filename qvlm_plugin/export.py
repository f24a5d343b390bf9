"""Write a quantized model as a Hugging Face folder that loads packed (`checkpoint`)."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qvlm_plugin import __version__, backends
from qvlm_plugin.atomic import require_vacant, staged
from qvlm_plugin.checkpoint import (
    NOTICE,
    NOTICE_KEY,
    ROTATION_SCALE,
    CheckpointRecord,
    StoredModule,
    file_hash,
    specification,
    stored_form,
)
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.hf_quantizer import QVLMQuantizationConfig
from qvlm_plugin.kernels.selection import Choice, Execution
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.model_card import CARD, PACKED, model_card
from qvlm_plugin.models.loading import LoadedModel, load
from qvlm_plugin.plan import RoundingPlan, begin_applying, factors_of, parameters_of, rotated_linear
from qvlm_plugin.plan_header import ModulePlan


def export(
    plan: RoundingPlan,
    loaded: LoadedModel,
    directory: Path,
    *,
    backend: str = "auto",
    strict: bool = False,
    shard_size: str = "5GB",
) -> Execution:
    """Quantize ``loaded`` by ``plan`` and write it; the model in memory is used up.

    Args:
        plan: made for this model.
        loaded: in full precision, on the device whose kernels are to be chosen from.
        directory: to write; it must not exist, or be empty. It is there completely or not at all.
        backend: as in `backends.kernels`; a folder keeps its kernels.
        strict: falling back is an error.
        shard_size: of weight files at most, as transformers' ``max_shard_size``.

    Returns:
        Which kernel serves which module.

    Raises:
        QVLMError: the folder is not empty; see `check_plan`; or what was written does not load and answer a prompt with
            finite numbers, which is tried before the folder takes its name.
    """
    require_vacant(directory)
    model, device = loaded.model, loaded.model.device
    execution = begin_applying(plan, model, loaded.fingerprint, backends.kernels(backend), strict)
    modules = tuple(_store(module, plan, loaded, execution.choices.get(module.name)) for module in plan.modules)
    record = CheckpointRecord(
        format_version=plan.oldest_format,
        package_version=__version__,
        backend=backend,
        model=plan.model,
        plan=plan.facts,
        calibration_digests=plan.calibration.digests if plan.calibration else (),
        modules=modules,
    )
    model.config.quantization_config = QVLMQuantizationConfig(**record.model_dump(mode="json"))

    def try_out(folder: Path) -> None:
        model.to("meta")  # its memory is needed
        with must_run():
            load(str(folder), device=device)

    arithmetic = ", ".join(f"{name} {count}" for name, count in execution.counts.items())
    card = model_card(directory.name, loaded.source, plan, arithmetic, PACKED)
    write_folder(loaded, directory, shard_size, card, try_out)
    return execution


@contextmanager
def must_run() -> Iterator[None]:
    """Around the trial of a quantized model, before its folder takes its name: a `QVLMError` says that it does not."""
    try:
        yield
    except QVLMError as error:
        raise QVLMError(f"the quantized model is not written, because it does not run: {error}") from error


def write_folder(
    loaded: LoadedModel,
    directory: Path,
    shard_size: str,
    card: str,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write model, processor and card in one step; a ``quantization_config`` of ours gets the files' hashes.

    Args:
        loaded: what to write.
        directory: to write.
        shard_size: see `export`.
        card: text of the model card.
        check: of the folder while it has another name; where it raises, nothing stays.
    """
    with staged(directory) as folder:
        loaded.model.save_pretrained(folder, max_shard_size=shard_size)
        loaded.processor.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "files" in config["quantization_config"]:
            names = sorted(file.name for file in folder.glob("model*.safetensors*"))
            config["quantization_config"]["files"] = {name: file_hash(folder / name) for name in names}
            config[NOTICE_KEY] = NOTICE
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")
        check(folder)


def _store(module: ModulePlan, plan: RoundingPlan, loaded: LoadedModel, choice: Choice | None) -> StoredModule:
    """Put the stored tensors of one Linear in its place, and say what they are."""
    if choice is None:
        return StoredModule(plan=module)
    linear, kernel, rotation = loaded.model.get_submodule(module.name), choice.kernel, plan.rotation_of(module)
    if rotation is not None:
        linear = rotated_linear(linear, factors_of(rotation, plan.tensors, linear.weight.device)[1])
    parameters = parameters_of(module, plan.tensors, linear.weight.device)
    neutral = kernel.prepare(linear.weight.detach(), linear.bias, module.weight, module.activation, parameters)
    if rotation is not None and rotation.scaled:
        neutral |= {ROTATION_SCALE: plan.tensors[f"{module.site}/scale"].float().to(linear.weight.device)}
    stored = stored_form(neutral)
    layer = QuantLinear(stored, module.weight, module.activation, kernel, module.shape)
    loaded.model.set_submodule(module.name, layer)
    specifications = {name: specification(tensor) for name, tensor in stored.items()}
    refused = dict(choice.refused) if choice.fell_back else {}
    return StoredModule(plan=module, kernel=kernel.name, rotation=rotation, tensors=specifications, refused=refused)
