"""Checkpoints in the layout of LLaVA's own code (haotian-liu/LLaVA and its descendants), for transformers' classes.

Such a folder has a ``config.json`` with ``mm_*`` keys, the language model's weights under its own names, and a slow
tokenizer; the vision tower is in the folder or named by ``mm_vision_tower``. Nothing is converted on disk: the
configuration, the names of the weights and the processor are translated while loading.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.arcade100k import ARCADE100K_FILE, arcade100k_tokenizer
from qvlm_plugin.models.llama_tokenizer import LlamaSettings, llama_tokenizer, read_settings
from qvlm_plugin.models.moe_stablelm_config import MoEStableLmConfig
from qvlm_plugin.models.prompts import IMAGE, IMAGE_END, IMAGE_START, PromptStyle, chat_template, prompt_format
from qvlm_plugin.models.towers import Tower, find_tower
from qvlm_plugin.models.weights import SAFETENSORS_OR_BIN, read_tensors, weight_files

TOWER_KEYS = ("mm_vision_tower", "mm_image_tower")
"""Keys of the configuration that name the vision tower: LLaVA's and MoE-LLaVA's."""

_NAMES = (
    (r"model\.mm_projector\.(image_spatial_proj\.)?0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.(image_spatial_proj\.)?2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.mm_projector\.(image_spatial_proj\.)?(?=weight|bias)", "model.multi_modal_projector.linear_1."),
    (r"model\.(vision_tower\.vision_tower|image_tower\.image_tower)\.vision_model\.", "model.vision_tower."),
    (r"vision_model\.", "model.vision_tower."),
    (r"(model\.layers\.\d+\.mlp\.)deepspeed_moe\.gate\.wg\.", r"\1router."),
    (r"(model\.layers\.\d+\.mlp\.)deepspeed_moe\.experts\.deepspeed_experts\.", r"\1experts."),
)
"""Patterns of prefixes of weights' names in such checkpoints, and their replacements in the model; the first three are
the projector's. All other names under ``model.`` are the language model's."""

EMBEDDINGS = "model.language_model.embed_tokens.weight"
"""The embeddings' name in the model."""

_SUPPORTED = {"s2": (False,), "mm_patch_merge_type": ("flat",), "mm_resampler_type": ()}
"""Keys of the configuration that are not supported, with the values that are allowed because they change nothing."""

_BUFFERS = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)")
"""Constants that older versions of transformers stored; the model computes them itself."""


@dataclass(frozen=True, eq=False)
class OriginalCheckpoint:
    """A folder in the original layout, of which only the small files have been read.

    Attributes:
        folder: the folder.
        source: the argument that names it, for messages.
        values: the content of its ``config.json``.
        config: the configuration for transformers.
        tower: the vision tower's configuration, image processing and files.
        prompt: name of the prompt format that such checkpoints are trained with.
    """

    folder: Path
    source: str
    values: Mapping[str, Any]
    config: LlavaConfig
    tower: Tower
    prompt: str

    def files(self) -> list[Path]:
        """The weight files, including those of a tower outside of the folder.

        Raises:
            QVLMError: some are missing.
        """
        files = weight_files(self.folder, SAFETENSORS_OR_BIN, self.source)
        return files if self._holds_tower(files) else [*files, *self._tower_files()]

    def _holds_tower(self, files: list[Path]) -> bool:
        """Whether the tower is the one in the folder: LLaVA uses this one only if it was trained."""
        return bool(self.values.get("unfreeze_mm_vision_tower")) and any(map(_is_towers, read_tensors(files)))

    def _tower_files(self) -> list[Path]:
        try:
            return self.tower.weight_files()
        except QVLMError as error:
            raise QVLMError(f"{error}; a tower in the folder is used with unfreeze_mm_vision_tower only") from error

    def processor(self) -> LlavaProcessor:
        """The processor; its image token has an embedding in the model or gets one (see `state_dict`)."""
        settings = None if (self.folder / ARCADE100K_FILE).is_file() else read_settings(self.folder)
        style = PromptStyle(
            between=bool(self.values.get("mm_use_im_start_end", False)),
            blanks=settings is not None and not settings.is_legacy,
        )
        return LlavaProcessor(
            image_processor=self._image_processor(),
            tokenizer=self._tokenizer(settings),
            patch_size=self.config.vision_config.patch_size,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            num_additional_image_tokens=1,  # CLIP's class embedding
            chat_template=chat_template(prompt_format(self.prompt), style),
        )

    def state_dict(self, image_token: int) -> dict[str, Tensor]:
        """All weights under the names of `LlavaForConditionalGeneration`, in the checkpoint's type.

        Args:
            image_token: id of the image token. Missing rows of embeddings and head up to it are copies of row 0: the
                unknown token, which neither text nor the model produces.

        Raises:
            QVLMError: the weights do not load, or have another vocabulary than the configuration.
        """
        weights = {}
        files = weight_files(self.folder, SAFETENSORS_OR_BIN, self.source)
        tensors = read_tensors(files)
        if not self._holds_tower(files):
            own = {name: tensor for name, tensor in tensors.items() if not _is_towers(name)}
            tensors = own | read_tensors(self._tower_files())
        for name, tensor in tensors.items():
            if not _BUFFERS.fullmatch(name) and (renamed := _rename(name)) is not None:
                weights[renamed] = tensor
        if EMBEDDINGS not in weights:
            raise QVLMError(
                f"{self.source}: the weights have no model.embed_tokens.weight, so they contain no language model"
            )
        if self.config.projector_hidden_act == "linear":
            if "model.multi_modal_projector.linear_2.weight" in weights:
                raise QVLMError(
                    f"{self.source}: the weights have a projector of two Linears, but config.json has a linear one; "
                    "set mm_projector_type in config.json to mlp2x_gelu"
                )
            width, dtype = self.config.text_config.hidden_size, weights[EMBEDDINGS].dtype
            weights["model.multi_modal_projector.linear_2.weight"] = torch.eye(width, dtype=dtype)
            weights["model.multi_modal_projector.linear_2.bias"] = torch.zeros(width, dtype=dtype)
        vocab = self.values["vocab_size"]
        for name in {EMBEDDINGS, "lm_head.weight"} & weights.keys():
            if (rows := len(weights[name])) != vocab:
                raise QVLMError(f"{self.source}: {name} has {rows} rows, but config.json has vocab_size={vocab}")
            if (lacking := image_token + 1 - vocab) > 0:
                weights[name] = torch.cat([weights[name], weights[name][:1].expand(lacking, -1)])
        return weights

    def generation_config(self, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """Greedy decoding up to the tokenizer's end token."""
        return GenerationConfig(
            do_sample=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    def _tokenizer(self, settings: LlamaSettings | None) -> PreTrainedTokenizerBase:
        if settings is None:
            tokenizer = arcade100k_tokenizer(self.folder / ARCADE100K_FILE)
        else:
            tokenizer = llama_tokenizer(self.folder, settings)
        rows = self.values["vocab_size"]
        # LLaVA's loader adds these if the folder's tokenizer lacks them; the patch token is in no prompt.
        if self.values.get("mm_use_im_patch_token", True) and len(tokenizer) < rows:
            _add(tokenizer, "<im_patch>")
        if self.values.get("mm_use_im_start_end", False):
            _add(tokenizer, IMAGE_START)
            _add(tokenizer, IMAGE_END)
        # LLaVA's loader makes embeddings for added tokens that have none, such as <pad>, but not for tokens of prompts.
        in_prompts = {tokenizer.bos_token, tokenizer.eos_token, IMAGE_START, IMAGE_END} & tokenizer.get_vocab().keys()
        last = max(tokenizer.vocab_size - 1, *map(tokenizer.convert_tokens_to_ids, in_prompts))
        if last >= rows:
            raise QVLMError(
                f"{self.source}: prompts and answers have {last + 1} tokens, more than config.json's vocab_size={rows}"
            )
        _add(tokenizer, IMAGE)
        # LLaVA's code truncates longer prompts, including images; here they are counted (`LoadedModel.context`).
        if (longest := self.values.get("tokenizer_model_max_length")) is not None:
            tokenizer.model_max_length = longest
        return tokenizer

    def _image_processor(self) -> CLIPImageProcessorPil | LlavaImageProcessorPil:
        pads = self.values.get("image_aspect_ratio") == "pad"
        settings = self.tower.pixels
        return LlavaImageProcessorPil(do_pad=True, **settings) if pads else CLIPImageProcessorPil(**settings)


def is_original(values: Mapping[str, Any]) -> bool:
    """Whether the content of a ``config.json`` is in the original layout."""
    return "vision_config" not in values and any(values.get(key) for key in TOWER_KEYS)


def read_original(folder: Path, values: Mapping[str, Any], source: str) -> OriginalCheckpoint:
    """Read a folder's configuration.

    Args:
        folder: a folder in the original layout.
        values: content of its ``config.json``.
        source: the argument that names it, for messages.

    Raises:
        QVLMError: such checkpoints are not supported, or the vision tower cannot be found.
    """
    missing = [key for key in ("hidden_size", "num_hidden_layers", "vocab_size") if key not in values]
    if missing:
        raise QVLMError(f"{source}: config.json has no {', '.join(missing)}, which LLaVA's configurations have")
    if (aspect := values.get("image_aspect_ratio")) not in (None, "square", "pad"):
        raise QVLMError(
            f"{source}: image_aspect_ratio={aspect!r} is not supported in the original layout; supported are pad and "
            "square; use the checkpoint in the Hugging Face layout (llava_next, llava_onevision)"
        )
    for key, allowed in _SUPPORTED.items():
        if (value := values.get(key)) not in (None, *allowed):
            raise QVLMError(
                f"{source}: {key}={value!r} is not supported in the original layout; leave it out"
                + "".join(f" or set it to {other!r}" for other in allowed)
            )
    text, prompt = _text_config(values, source)
    name = next(values[key] for key in TOWER_KEYS if values.get(key))
    tower = find_tower(name, folder, source)
    longest = values.get("tokenizer_model_max_length")
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise QVLMError(f"{source}: tokenizer_model_max_length={longest!r} is not a number of tokens")
    activation = _projector_activation(values, source)
    feature = values.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise QVLMError(f"{source}: mm_vision_select_feature={feature!r} is not known; known are patch and cls_patch")
    vision = CLIPVisionConfig(**tower.config.to_dict())
    layer, depth = values.get("mm_vision_select_layer", -2), vision.num_hidden_layers
    if not -depth - 1 <= layer <= depth:
        raise QVLMError(f"{source}: mm_vision_select_layer={layer}, but vision tower {name!r} has {depth} layers")
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 + (feature == "cls_patch"),
        vision_feature_layer=layer,
        vision_feature_select_strategy="default" if feature == "patch" else "full",
        projector_hidden_act=activation,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return OriginalCheckpoint(
        folder, source, values, config, tower, prompt or ("llava_v1" if activation == "linear" else "vicuna_v1")
    )


def _projector_activation(values: Mapping[str, Any], source: str) -> str:
    """The activation between the projector's two Linears; ``linear`` for a projector of one, whose second is a unit
    matrix."""
    kind = values.get("mm_projector_type") or values.get("image_projector_type") or "linear"
    if kind not in ("linear", "mlp2x_gelu"):
        raise QVLMError(f"{source}: mm_projector_type={kind!r} is not known; known are linear and mlp2x_gelu")
    return "linear" if kind == "linear" else "gelu"


def _text_config(values: Mapping[str, Any], source: str) -> tuple[PretrainedConfig, str | None]:
    """The language model's configuration, and its prompt format; None if the projector decides the format."""
    kind = values.get("model_type", "llava")
    if kind == "moe_llava_stablelm":
        return _moe_stablelm_config(values, source), "stablelm"
    if kind not in ("llava", "llava_llama", "llama"):
        raise QVLMError(
            f"{source}: model type {kind!r} is not supported in the original layout; supported are llava, llava_llama "
            "and moe_llava_stablelm"
        )
    known = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
        "tie_word_embeddings", "rope_theta", "rope_scaling", "attention_bias", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    return LlamaConfig(**{key: values[key] for key in known if values.get(key) is not None}), None


def _moe_stablelm_config(values: Mapping[str, Any], source: str) -> MoEStableLmConfig:
    moe = values.get("moe") or {}
    layers = tuple(moe.get("moe_layers_idx") or ())
    if outside := [layer for layer in layers if layer not in range(values["num_hidden_layers"])]:
        raise QVLMError(
            f"{source}: moe_layers_idx has {outside[0]}, but there are {values['num_hidden_layers']} layers, from 0"
        )
    experts = moe.get("num_experts") or [0]
    experts = {experts} if isinstance(experts, int) else set(experts)
    if moe.get("use_residual") or moe.get("top_k_experts", 2) != 2 or len(experts) > 1 or min(experts) < 2:
        raise QVLMError(
            f"{source}: moe={dict(moe)} is not supported; supported are layers of equally many experts, at least 2, of "
            "which 2 serve a token, without use_residual"
        )
    count, capacity = experts.pop(), moe.get("eval_capacity_factor", 1.0)  # DeepSpeed's default
    # An expert has room for 2 * capacity / count of the tokens (deepspeed/moe/sharded_moe.py, top2gating).
    if not (isinstance(capacity, int | float) and 2 * capacity >= count):  # refuses NaN, too
        raise QVLMError(
            f"{source}: eval_capacity_factor={capacity!r} of moe drops tokens if an expert is chosen often, which "
            f"is not supported; with {count} experts it must be a number of at least {count / 2:g}"
        )
    return MoEStableLmConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values.get("num_key_value_heads", values["num_attention_heads"]),
        max_position_embeddings=values.get("max_position_embeddings", 4096),
        layer_norm_eps=values.get("norm_eps", values.get("layer_norm_eps", 1e-5)),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(values.get("rope_theta", 10_000)),
            "partial_rotary_factor": values.get("rope_pct", values.get("partial_rotary_factor", 0.25)),
        },
        use_qkv_bias=values.get("use_qkv_bias", True),
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        num_experts=count,
        moe_layers=layers,
        bos_token_id=values.get("bos_token_id"),
        eos_token_id=values.get("eos_token_id"),
    )


def _is_towers(name: str) -> bool:
    return (_rename(name) or "").startswith("model.vision_tower.")


def _rename(name: str) -> str | None:
    """The model's name for a weight; None for weights of a CLIP file that are not the vision tower's."""
    for pattern, replacement in _NAMES:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count and not renamed.startswith("model.layers."):
            return renamed
        name = renamed
    if name.startswith(("text_model.", "visual_projection.", "text_projection.", "logit_scale")):
        return None
    return re.sub(r"^model\.", "model.language_model.", name)


def _add(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
