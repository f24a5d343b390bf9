"""Vision towers that checkpoints in LLaVA's own layout name instead of holding."""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, CLIPVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.hub import local_folder, with_weights
from qvlm_plugin.models.weights import SAFETENSORS_OR_BIN, weight_files

_CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
KNOWN_TOWERS = {
    "clip-vit-large-patch14": CLIPVisionConfig(**_CLIP_L, image_size=224),
    "clip-vit-large-patch14-336": CLIPVisionConfig(**_CLIP_L, image_size=336),
}
"""Towers of released checkpoints by the last part of their name: a folder that holds their weights needs no more."""


@dataclass(frozen=True, eq=False)
class Tower:
    """A CLIP vision tower.

    Attributes:
        name: folder or hub id.
        source: what named it, for messages.
        config: its configuration; ``image_size`` is that of its input.
        image_mean, image_std: of the pixels' normalization.
    """

    name: str
    source: str
    config: CLIPVisionConfig
    image_mean: tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    image_std: tuple[float, ...] = tuple(OPENAI_CLIP_STD)

    def weight_files(self) -> list[Path]:
        """The files of its weights, downloaded where it is a hub model.

        Raises:
            QVLMError: they are not there.
        """
        return weight_files(with_weights(self.name, self.source, SAFETENSORS_OR_BIN), SAFETENSORS_OR_BIN, self.source)


def find_tower(name: str, folder: Path, source: str) -> Tower:
    """The tower that a checkpoint names.

    Args:
        name: folder (also relative to the checkpoint's) or hub id.
        folder: of the checkpoint.
        source: what named the checkpoint, for messages.

    Raises:
        QVLMError: it cannot be found, or is not a CLIP model.
    """
    source = f"{source}: vision tower {name!r}"
    beside = [
        path for path in (Path(name), folder / name, folder / Path(name).name) if (path / "config.json").is_file()
    ]
    if not beside and (known := KNOWN_TOWERS.get(name.rpartition("/")[2])):
        return Tower(name, source, known)
    place = beside[0] if beside else local_folder(name, source)
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise QVLMError(f"{source}: config.json does not load: {' '.join(str(error).split())[:300]}") from error
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise QVLMError(f"{source} is a {config.model_type!r}; supported in the original layout are CLIP vision towers")
    file = place / "preprocessor_config.json"
    pixels = json.loads(file.read_text()) if file.is_file() else {}
    mean, deviation = pixels.get("image_mean", OPENAI_CLIP_MEAN), pixels.get("image_std", OPENAI_CLIP_STD)
    return Tower(str(place) if beside else name, source, config, tuple(mean), tuple(deviation))
