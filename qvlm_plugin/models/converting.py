"""Write a loaded checkpoint in the Hugging Face layout."""

from pathlib import Path
from typing import Any

from qvlm_plugin.atomic import require_vacant, staged
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.dtypes import AUTO
from qvlm_plugin.models.loading import load_weights, open_checkpoint
from qvlm_plugin.models.placement import check_placement


def convert(source: str, output: Path, dtype: str = AUTO, **opening: Any) -> Path:
    """Write a checkpoint of either layout as safetensors with a processor, and return the folder.

    Args:
        source: the checkpoint's folder or hub id.
        output: a new or empty folder; it is written completely or not at all.
        dtype: type in which weights are stored, one of `DTYPES`.
        opening: arguments of `open_checkpoint`.

    Raises:
        QVLMError: ``output`` is not empty, or the checkpoint is quantized or does not load.
    """
    require_vacant(output)
    check_placement(dtype, "cpu")
    checkpoint = open_checkpoint(source, **opening)
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        raise QVLMError(f"{checkpoint.source} is already quantized; convert takes a checkpoint in full precision")
    loaded = load_weights(checkpoint, dtype=dtype)
    with staged(output) as folder:
        loaded.model.save_pretrained(folder)
        loaded.processor.save_pretrained(folder)
    return output
