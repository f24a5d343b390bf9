"""Load a vision-language model and its processor, and account for every weight.

A folder's configuration shows whether it has the Hugging Face layout or LLaVA's own. No weight is silently initialised:
missing keys, unknown keys and weights of another shape are errors. The fingerprint identifies a model by its content,
independent of its location.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import cpu_offload
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.memory import trim_heap
from qvlm_plugin.models.content_hash import content_hash
from qvlm_plugin.models.dry_run import answer, check_prompts
from qvlm_plugin.models.dtypes import AUTO
from qvlm_plugin.models.hub import local_folder, small_files, with_weights
from qvlm_plugin.models.original import EMBEDDINGS, TOWER_KEYS, OriginalCheckpoint, is_original, read_original
from qvlm_plugin.models.placement import check_placement, empty_model
from qvlm_plugin.models.pre_quantized import (
    check_quantizer,
    correct_blocks,
    correct_ignored,
    correct_unconverted,
    loading_hint,
    note_schemes,
    read_packed_zero_points,
)
from qvlm_plugin.models.processors import read_processor
from qvlm_plugin.models.prompts import IMAGE, PROMPT_FORMATS, chat_template, name_of, origin_of, prompt_format
from qvlm_plugin.models.weights import SAFETENSORS, SAFETENSORS_OR_BIN, weight_files
from qvlm_plugin.reading import one_line, parsed_elsewhere, read_json
from qvlm_plugin.topology import Topology

if TYPE_CHECKING:
    from qvlm_plugin.quantized_loading import QuantizeOnLoad

OFFLOAD = "offload"
"""This package's own value of ``device_map``; see `load_weights`."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to run, in evaluation mode.

    Attributes:
        model: the transformers model.
        processor: its processor, padding on the left.
        source: the value of ``pretrained``.
        fingerprint: SHA-256 over all files that answers depend on: weights, configuration, tokenizer, processor, chat
            template and generation.
        prompt: name of the prompt format; None for a chat template of the checkpoint's own.
        context: maximum number of tokens of a prompt: the smaller of the model's positions and the tokenizer's limit;
            None if neither is known.
        topology: the traced topology; None for the one that plugins describe.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    source: str
    fingerprint: str
    prompt: str | None = None
    context: int | None = None
    topology: Topology | None = None

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def conv(self) -> str:
        """The prompt format, in words."""
        return self.prompt or "the checkpoint's own"

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which every answer ends, in addition to the end token."""
        stop = PROMPT_FORMATS[self.prompt].stop if self.prompt else ""
        return (stop,) if stop else ()


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint whose small files, all but the weights, have been read and checked.

    Attributes:
        pretrained, revision: the arguments that name it.
        config: the model's configuration.
        processor: the processor, ready to form prompts.
        original: the checkpoint in LLaVA's own layout; None in the Hugging Face layout.
        trust_remote_code: whether code that comes with it may run.
        changes: arguments of `open_checkpoint` that override its files, by name; None if not given.
        topology: the traced topology; None for the one that plugins describe.
    """

    pretrained: str
    revision: str | None
    config: PretrainedConfig
    processor: ProcessorMixin
    original: OriginalCheckpoint | None
    trust_remote_code: bool
    changes: Mapping[str, Any]
    topology: Topology | None = None

    @property
    def source(self) -> str:
        """The checkpoint's name in messages."""
        return f"pretrained={self.pretrained!r}"


def open_checkpoint(
    pretrained: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    conv: str | None = None,
    router_noise_seed: int | None = None,
    image_aspect_ratio: str | None = None,
    check_config: Callable[[PretrainedConfig], object] | None = None,
) -> Checkpoint:
    """Read the small files of a checkpoint, and check that prompts with images can be formed and fit the model.

    Args:
        pretrained: a folder in the Hugging Face layout or in that of LLaVA's own code, or a hub id such as
            ``llava-hf/llava-1.5-7b-hf`` or ``liuhaotian/llava-v1.5-7b``.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run code that comes with the checkpoint.
        conv: a prompt format (see `qvlm_plugin.models.prompts`) instead of the checkpoint's.
        router_noise_seed: seed of the noise in the choice of experts, for models that have it; None adds no noise.
        image_aspect_ratio: ``square`` or ``pad`` instead of the setting of a checkpoint in LLaVA's own layout.
        check_config: called with the configuration; raises if it is not suitable.

    Raises:
        QVLMError: there is no such checkpoint, or its parts do not fit together.
    """
    prompt = None if conv is None else prompt_format(conv)
    source = f"pretrained={pretrained!r}"
    folder = local_folder(pretrained, source, revision)
    original, config = _read_layout(folder, source, trust_remote_code, image_aspect_ratio)
    _set_router_noise(config, router_noise_seed, source)
    with parsed_elsewhere(f"{source}: its quantization_config does not load"):
        check_quantizer(config, source)
        correct_ignored(config, source)
        correct_blocks(config)
        read_packed_zero_points(config)
    if check_config is not None:
        check_config(config)
    with parsed_elsewhere(f"{source}: the processor does not load"):
        processor = original.processor() if original else read_processor(folder, trust_remote_code)
    if prompt is not None:
        origin = origin_of(getattr(processor, "chat_template", None) or "")
        processor.chat_template = chat_template(prompt, origin and origin[1])
    prepare(processor, source, conv)
    if original:
        config.image_token_index = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    check_prompts(processor, config, source, trust_remote_code)
    changes = {"router_noise_seed": router_noise_seed, "image_aspect_ratio": image_aspect_ratio}
    return Checkpoint(pretrained, revision, config, processor, original, trust_remote_code, changes)


def load(
    pretrained: str,
    *,
    dtype: str = AUTO,
    device: str | torch.device = "cpu",
    device_map: str | dict[str, Any] | None = None,
    quantize: "QuantizeOnLoad | None" = None,
    **opening: Any,
) -> LoadedModel:
    """Open a checkpoint and load its weights: see `open_checkpoint`, which takes ``opening``, and `load_weights`."""
    check_placement(dtype, device)
    checkpoint = open_checkpoint(pretrained, **opening)
    return load_weights(checkpoint, dtype=dtype, device=device, device_map=device_map, quantize=quantize)


def load_weights(
    checkpoint: Checkpoint,
    *,
    dtype: str = AUTO,
    device: str | torch.device = "cpu",
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    quantize: "QuantizeOnLoad | None" = None,
) -> LoadedModel:
    """Load the model of a checkpoint, and let it answer one prompt.

    Args:
        checkpoint: the checkpoint, whose weights are downloaded if necessary.
        dtype: one of `DTYPES`.
        device: device that the model runs on, unless ``device_map`` is given.
        device_map: ``offload`` keeps all weights on the CPU and moves each module's to ``device`` while it runs, so
            that a model that does not fit there can be searched. Any other value is accelerate's placement, which
            replaces ``device``: ``auto`` fills the devices, leaving little room, before it offloads the rest; on
            ``meta`` there are no weights, and the model answers no prompt.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``; None leaves the choice to transformers.
        quantize: quantizes each Linear as soon as its weight is read, so that not all weights are in full precision at
            the same time.

    Raises:
        QVLMError: weights are missing, their keys do not match the model's, or the model cannot answer.
    """
    check_placement(dtype, device)
    compute_type = dtype if dtype == AUTO else getattr(torch, dtype)
    original, config, processor = checkpoint.original, checkpoint.config, checkpoint.processor
    source, trust_remote_code = checkpoint.source, checkpoint.trust_remote_code
    if getattr(config, "quantization_config", None) is not None:
        if device_map == OFFLOAD:
            raise QVLMError(f"device_map='offload' is for searches, but {source} is already quantized")
        # Packed weights are laid out for the device that they are loaded to.
        device_map = {"": device} if device_map is None else device_map
    formats = SAFETENSORS_OR_BIN if original else SAFETENSORS
    folder = with_weights(checkpoint.pretrained, source, formats, checkpoint.revision)
    files = original.files() if original else weight_files(folder, formats, source)
    folders = [folder, original.tower.folder] if original else [folder]
    fingerprint = _fingerprint([path for path in folders if path], files, checkpoint.changes)
    placement = {
        "device_map": None if device_map == OFFLOAD else device_map,
        "attn_implementation": attn_implementation,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # `_require_matching_keys` raises instead
    }
    if quantize is not None:
        quantize.fingerprint, quantize.device = fingerprint, torch.device(device)
        placement |= {"quantization_config": quantize, "device_map": {"": device} if device_map is None else device_map}
    hint = loading_hint(config)
    with parsed_elsewhere(f"{source}: the weights do not load{hint}"):
        correct_unconverted(config, files, trust_remote_code, source)
        if original:
            model, info = _load_original(original, processor, compute_type, placement)
        elif quantize is not None:
            model, info = _load_by_tensor(folder, files, config, compute_type, trust_remote_code, placement)
        else:
            model, info = AutoModelForImageTextToText.from_pretrained(
                folder,
                config=config,
                dtype=compute_type,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                **placement,
            )
    _require_matching_keys(source, info, hint)
    note_schemes(model, config)
    if device_map is None:
        model.to(device)
    elif device_map == OFFLOAD:
        cpu_offload(model, torch.device(device))
    model.eval()
    if device_map != "meta":
        answer(model, processor, source)
        trim_heap()
    prompt, context = name_of(processor.chat_template), _context(config, processor)
    return LoadedModel(model, processor, checkpoint.pretrained, fingerprint, prompt, context, checkpoint.topology)


def _context(config: PretrainedConfig, processor: ProcessorMixin) -> int | None:
    limits = (getattr(config.get_text_config(), "max_position_embeddings", None), processor.tokenizer.model_max_length)
    return min((limit for limit in limits if isinstance(limit, int) and limit < VERY_LARGE_INTEGER), default=None)


def _read_layout(
    folder: Path, source: str, trust_remote_code: bool, image_aspect_ratio: str | None
) -> tuple[OriginalCheckpoint | None, PretrainedConfig]:
    """The configuration, and the checkpoint if it is in the original layout."""
    values = _read_config_file(folder, source)
    with parsed_elsewhere(f"{source}: config.json does not load"):
        if image_aspect_ratio is not None:
            if not is_original(values):
                raise QVLMError(f"{source}: image_aspect_ratio is only for checkpoints in LLaVA's own layout")
            values["image_aspect_ratio"] = image_aspect_ratio
        if is_original(values):
            original = read_original(folder, values, source)
            return original, original.config
        if "auto_map" in values and not trust_remote_code and values["model_type"] not in CONFIG_MAPPING:
            raise QVLMError(
                f"{source}: transformers does not know model_type={values['model_type']!r}, whose code comes with it; "
                "such code runs in an evaluation only, with trust_remote_code=true (docs/add-a-family.md)"
            )
        return None, AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _read_config_file(folder: Path, source: str) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise QVLMError(
            f"{source}: config.json is missing; both the Hugging Face layout and LLaVA's own layout have one"
        )
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise QVLMError(f"{source}: config.json does not load: {one_line(error)}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise QVLMError(
            f"{source}: config.json has neither layout; in the Hugging Face layout it has a model_type and a "
            f"vision_config, in that of LLaVA's own code {' or '.join(TOWER_KEYS)}"
        )
    if not isinstance(values.get("quantization_config") or {}, dict):
        raise QVLMError(f"{source}: quantization_config in config.json must be an object with a quant_method")
    return values


def _set_router_noise(config: PretrainedConfig, seed: int | None, source: str) -> None:
    if seed is None:
        return
    text = getattr(config, "text_config", None)
    if not hasattr(text, "router_noise_seed"):
        raise QVLMError(f"{source}: router_noise_seed is only for models that choose experts with noise (MoE-LLaVA)")
    text.router_noise_seed = seed


def prepare(processor: ProcessorMixin, source: str, conv: str | None = None) -> None:
    """Set the padding, and check that prompts can be formed.

    Args:
        processor: the processor, which is changed.
        source: the checkpoint's name in messages.
        conv: the prompt format given, if any.

    Raises:
        QVLMError: there is no chat template, or it ends answers with another token than the tokenizer.
    """
    if not getattr(processor, "chat_template", None):
        raise QVLMError(
            f"{source}: the processor has no chat template, so prompts cannot be formed; name a format with conv="
        )
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    name = name_of(processor.chat_template)
    if name and not PROMPT_FORMATS[name].stop and (end := PROMPT_FORMATS[name].after_assistant) != tokenizer.eos_token:
        raise QVLMError(
            f"{source}: conv={conv or name} ends answers with {end}, the tokenizer with {tokenizer.eos_token}; name "
            f"another format of {', '.join(PROMPT_FORMATS)}"
        )


def _load_original(
    original: OriginalCheckpoint, processor: ProcessorMixin, dtype: torch.dtype | str, placement: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    config = original.config
    weights = original.state_dict(config.image_token_index)
    embeddings = weights[EMBEDDINGS]
    config.text_config.vocab_size = len(embeddings)
    model, info = LlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=embeddings.dtype if dtype == "auto" else dtype, **placement
    )
    model.generation_config = original.generation_config(processor.tokenizer)
    return model, info


def _load_by_tensor(
    folder: Path,
    files: list[Path],
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    placement: dict[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model by reading each tensor into its own memory, which is freed with the tensor.

    transformers maps weight files into memory, where all that has been read counts as used until the last weight is
    freed.
    """
    kind = type(empty_model(config, trust_remote_code))
    handles = [safe_open(file, framework="pt", backend="pread") for file in files]
    weights = {key: handle.get_slice(key) for handle in handles for key in handle.keys()}  # noqa: SIM118
    model, info = kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **placement)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, info


def _require_matching_keys(source: str, info: dict[str, Any], hint: str) -> None:
    problems = {
        "missing in the checkpoint": info.get("missing_keys"),
        "unknown to the model": info.get("unexpected_keys"),
        "of another shape": info.get("mismatched_keys"),
    }
    for what, keys in problems.items():
        if keys:
            names = sorted(key if isinstance(key, str) else key[0] for key in keys)
            raise QVLMError(f"{source}: {len(names)} weights are {what}, for example {', '.join(names[:3])}{hint}")


def _fingerprint(folders: list[Path], weights: list[Path], changes: Mapping[str, Any]) -> str:
    sha = hashlib.sha256()
    for folder in folders:
        for file in small_files(folder):
            sha.update(f"{file.relative_to(folder).as_posix()}\0{content_hash(file)}\n".encode())
    for name, value in changes.items():
        if value is not None:  # the same weights then compute something else
            sha.update(f"{name}={value}".encode())
    for file in weights:
        sha.update(content_hash(file).encode())
    return sha.hexdigest()
