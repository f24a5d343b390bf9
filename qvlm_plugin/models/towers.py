"""Vision towers that checkpoints in LLaVA's own layout refer to by name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import AutoConfig, CLIPVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.hub import local_folder, with_weights
from qvlm_plugin.models.weights import SAFETENSORS_OR_BIN, weight_files
from qvlm_plugin.reading import inside, one_line, parsed_elsewhere, read_json

_CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
KNOWN_TOWERS = {
    "clip-vit-large-patch14": CLIPVisionConfig(**_CLIP_L, image_size=224),
    "clip-vit-large-patch14-336": CLIPVisionConfig(**_CLIP_L, image_size=336),
}
"""Towers of released checkpoints by the last part of their name; only their weights are downloaded."""


_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, eq=False)
class Tower:
    """A CLIP vision tower.

    Attributes:
        name: folder or hub id.
        source: the argument that names it, for messages.
        config: its configuration; ``image_size`` is that of its input.
        pixels: arguments of CLIP's image processor.
        folder: the folder that the configuration was read from; None for one of `KNOWN_TOWERS`.
    """

    name: str
    source: str
    config: CLIPVisionConfig
    pixels: Mapping[str, Any]
    folder: Path | None = None

    def weight_files(self) -> list[Path]:
        """The tower's weight files, downloaded if it is a hub model.

        Raises:
            QVLMError: they do not exist.
        """
        return weight_files(with_weights(self.name, self.source, SAFETENSORS_OR_BIN), SAFETENSORS_OR_BIN, self.source)


class _Pixels(BaseModel):
    """The image processing in a ``preprocessor_config.json``; missing settings have CLIP's defaults."""

    do_resize: bool | None = None
    size: int | dict[str, int] | None = None
    resample: int | None = None
    do_center_crop: bool | None = None
    crop_size: int | dict[str, int] | None = None
    do_rescale: bool | None = None
    rescale_factor: float | None = None
    do_normalize: bool | None = None
    image_mean: tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    image_std: tuple[float, ...] = tuple(OPENAI_CLIP_STD)

    def settings(self, image_size: int) -> dict[str, Any]:
        """The arguments of CLIP's image processor for a tower with this input size."""
        given = self.model_dump(exclude_none=True)
        size, crop = given.get("size", image_size), given.get("crop_size", image_size)
        return {
            **given,
            "size": {"shortest_edge": size} if isinstance(size, int) else size,
            "crop_size": {"height": crop, "width": crop} if isinstance(crop, int) else crop,
        }


def find_tower(name: str, folder: Path, source: str) -> Tower:
    """The tower that a checkpoint names.

    Args:
        name: a folder in the checkpoint's folder, or a hub id. If it is a path on another machine, only its last part
            is looked up, in the checkpoint's folder.
        folder: the checkpoint's folder.
        source: the argument that names the checkpoint, for messages.

    Raises:
        QVLMError: it cannot be found, or is not a CLIP model.
    """
    source = f"{source}: vision tower {name!r:.200}"
    last = str(name).rstrip("/").rpartition("/")[2]
    is_hub_id = isinstance(name, str) and _HUB_ID.fullmatch(name) is not None
    inner = [inside(folder, part, source) for part in ((name, last) if is_hub_id else (last,))]
    beside = [inner_path for inner_path in inner if (inner_path / "config.json").is_file()]
    if not beside and last in KNOWN_TOWERS:
        known = KNOWN_TOWERS[last]
        return Tower(name if is_hub_id else f"openai/{last}", source, known, _Pixels().settings(known.image_size))
    if not beside and not is_hub_id:
        raise QVLMError(f"{source} is neither a hub id nor in the checkpoint's folder; put it there, or a link to it")
    path = beside[0] if beside else local_folder(name, source)
    with parsed_elsewhere(f"{source}: config.json does not load"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise QVLMError(f"{source} is a {config.model_type!r}; supported in the original layout are CLIP vision towers")
    file = path / "preprocessor_config.json"
    pixels = _Pixels()
    if file.is_file():
        try:
            pixels = _Pixels.model_validate(read_json(file))
        except (OSError, ValueError) as error:
            raise QVLMError(f"{source}: {file.name} does not load: {one_line(error)}") from error
    return Tower(str(path) if beside else name, source, config, pixels.settings(config.image_size), path)
