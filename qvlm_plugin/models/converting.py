"""Write what was loaded in the Hugging Face layout."""

import tempfile
from pathlib import Path

from qvlm_plugin.errors import QVLMError
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
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise QVLMError(f"{output} exists and is not an empty folder; name a new one")
    loaded = load(source, revision=revision, conv=conv, dtype=dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        fresh = Path(scratch) / "model"
        loaded.model.save_pretrained(fresh)
        loaded.processor.save_pretrained(fresh)
        if output.exists():
            output.rmdir()
        fresh.rename(output)
    return output
