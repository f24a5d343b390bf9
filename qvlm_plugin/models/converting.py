"""Write what was loaded in the Hugging Face layout."""

from pathlib import Path

from qvlm_plugin.atomic import require_vacant, staged
from qvlm_plugin.models.loading import load


def convert(
    source: str, output: Path, *, revision: str | None = None, conv: str | None = None, dtype: str = "auto"
) -> Path:
    """Write a checkpoint of either layout as safetensors with a processor, and return the folder.

    Args:
        source, revision, conv, dtype: see `qvlm_plugin.models.loading.load`.
        output: a new or empty folder; it is there whole or not at all.

    Raises:
        QVLMError: ``output`` holds something, or the checkpoint does not load.
    """
    require_vacant(output)
    loaded = load(source, revision=revision, conv=conv, dtype=dtype)
    with staged(output) as folder:
        loaded.model.save_pretrained(folder)
        loaded.processor.save_pretrained(folder)
    return output
