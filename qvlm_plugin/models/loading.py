"""Load a vision-language model and its processor, and account for every weight.

Nothing is ever silently initialised: keys that are missing from the checkpoint, left over in it or of another shape are
errors. The fingerprint identifies the weights by content, wherever they lie.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from qvlm_plugin.errors import QVLMError

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""The accepted names of compute types; ``auto`` is the checkpoint's own."""

OFFLOAD = "offload"
"""The ``device_map`` of ours, see `load`."""

_WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to run, in evaluation mode.

    Attributes:
        model: the transformers model.
        processor: its processor, padding on the left.
        source: what ``pretrained`` named.
        fingerprint: SHA-256 over the configuration and the weight files.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    source: str
    fingerprint: str


def load(
    pretrained: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    check_config: Callable[[PretrainedConfig], object] | None = None,
) -> LoadedModel:
    """Load a checkpoint folder or hub model.

    Args:
        pretrained: a folder in the Hugging Face layout, or a hub id such as ``llava-hf/llava-1.5-7b-hf``.
        revision: branch, tag or commit of a hub model.
        dtype: one of `DTYPES`.
        device: where the model runs when no ``device_map`` says otherwise.
        device_map: ``offload`` keeps all weights on the CPU and brings each module's to ``device`` while it runs, which
            leaves room there to search a model that does not fit. All else is accelerate's placement and takes the
            place of ``device``: ``auto`` fills the devices, leaving little room, before it offloads the rest.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``; None leaves transformers' choice.
        trust_remote_code: run code that comes with the checkpoint.
        check_config: called with the configuration before the weights are loaded, to raise where it does not suit.

    Raises:
        QVLMError: the folder or hub model is not there or not complete, or its keys do not match the model's.
    """
    if dtype not in DTYPES:
        raise QVLMError(f"dtype={dtype!r} is not known; allowed are {', '.join(DTYPES)}")
    folder = _resolve(pretrained, revision)
    config = _read_config(folder, pretrained, trust_remote_code)
    if check_config is not None:
        check_config(config)
    files = _weight_files(folder, pretrained)
    if getattr(config, "quantization_config", None) is not None:
        if device_map == OFFLOAD:
            raise QVLMError(f"device_map='offload' is for searching, and pretrained={pretrained!r} is quantized already")
        # Packed weights are laid out for the device that they are loaded to.
        device_map = {"": device} if device_map is None else device_map
    try:
        # The PIL image processor: the same pixels whether or not, and whichever, torchvision is installed.
        processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise QVLMError(f"pretrained={pretrained!r}: the processor does not load: {_one_line(error)}") from error
    if not getattr(processor, "chat_template", None):
        raise QVLMError(f"pretrained={pretrained!r}: the processor has no chat template, so prompts cannot be formed")
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            config=config,
            dtype=DTYPES[dtype],
            device_map=None if device_map == OFFLOAD else device_map,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise QVLMError(f"pretrained={pretrained!r}: the weights do not load: {_one_line(error)}") from error
    _require_matching_keys(pretrained, info)
    if device_map is None:
        model.to(device)
    elif device_map == OFFLOAD:
        cpu_offload(model, torch.device(device))
    return LoadedModel(model.eval(), processor, pretrained, _fingerprint(folder, files))


def _resolve(pretrained: str, revision: str | None) -> Path:
    """The local folder of a checkpoint, downloading a hub model when it is not cached."""
    if Path(pretrained).is_dir():
        return Path(pretrained)
    if pretrained.startswith((".", "/", "~")) or pretrained.count("/") > 1:
        raise QVLMError(f"pretrained={pretrained!r}: there is no such folder")
    try:
        return Path(snapshot_download(pretrained, revision=revision, allow_patterns=list(_WANTED_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise QVLMError(
            f"pretrained={pretrained!r} is neither a folder nor a hub model that can be reached: {_one_line(error)}"
        ) from error


def _read_config(folder: Path, pretrained: str, trust_remote_code: bool) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise QVLMError(
            f"pretrained={pretrained!r}: config.json is missing; a folder in the Hugging Face layout has one"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise QVLMError(f"pretrained={pretrained!r}: config.json does not load: {_one_line(error)}") from error


def _weight_files(folder: Path, pretrained: str) -> list[Path]:
    """The safetensors files of a checkpoint; every shard that an index names must be there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise QVLMError(
            f"pretrained={pretrained!r}: missing {', '.join(missing)}; weights are read from safetensors files only"
        )
    return files


def _require_matching_keys(pretrained: str, info: dict[str, Any]) -> None:
    problems = {
        "missing in the checkpoint": info.get("missing_keys"),
        "unknown to the model": info.get("unexpected_keys"),
        "of another shape": info.get("mismatched_keys"),
    }
    for what, keys in problems.items():
        if keys:
            names = sorted(key if isinstance(key, str) else key[0] for key in keys)
            raise QVLMError(
                f"pretrained={pretrained!r}: {len(names)} weights are {what}, for example {', '.join(names[:3])}"
            )


def _fingerprint(folder: Path, files: list[Path]) -> str:
    sha = hashlib.sha256((folder / "config.json").read_bytes())
    for file in files:
        sha.update(_content_hash(file).encode())
    return sha.hexdigest()


def _content_hash(file: Path) -> str:
    # In the hub's cache a weight file is a link to a blob that is named by its SHA-256: no need to read gigabytes.
    blob = file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
