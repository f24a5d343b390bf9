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
    shard_size: int | str = "5GB",
) -> Execution:
    """Quantize ``loaded`` by ``plan`` and write it; the model in memory cannot be used afterwards.

    Args:
        plan: a plan for this model.
        loaded: the model in full precision, on the device for which kernels are chosen.
        directory: new or empty folder; it is written completely or not at all.
        backend: name of a backend, see `backends.kernels`; a folder keeps its kernels.
        strict: whether falling back is an error.
        shard_size: maximum size of a weight file, as transformers' ``max_shard_size``.

    Returns:
        Which kernel runs which module.

    Raises:
        QVLMError: the folder is not empty; see `check_plan`; or the written model does not load and answer a prompt
            with finite numbers, which is tested before the folder gets its name.
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
    """A context for the trial of a quantized model; its errors say that the model is not written."""
    try:
        yield
    except QVLMError as error:
        raise QVLMError(f"the quantized model is not written, because it does not run: {error}") from error


def write_folder(
    loaded: LoadedModel,
    directory: Path,
    shard_size: int | str,
    card: str,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write model, processor and card in one step; this package's ``quantization_config`` gets the files' hashes.

    Args:
        loaded: the model and processor.
        directory: folder to write.
        shard_size: see `export`.
        card: text of the model card.
        check: called with the folder while it has a temporary name; if it raises, nothing is kept.
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
    """Replace one Linear by its stored tensors, and return their description."""
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
