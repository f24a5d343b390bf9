"""Find or download the folders of checkpoints, and upload them."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import one_line, parsed_elsewhere

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""Patterns of the files of configuration, tokenizer, processor and generation settings."""


def local_folder(name: str, source: str, revision: str | None = None, files: Sequence[str] = SMALL_FILES) -> Path:
    """The folder ``name``, or the local copy of the hub model of this name.

    Args:
        name: a folder or hub id.
        source: the argument that names it, for messages.
        revision: branch, tag or commit of a hub model.
        files: patterns of the files to download if they are missing.

    Raises:
        QVLMError: there is no such folder or hub model, or the hub cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise QVLMError(f"{source}: there is no such folder")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = one_line(error)
        raise QVLMError(f"{source} is neither a folder nor a hub model that can be reached: {reason}") from error


def small_files(folder: Path) -> list[Path]:
    """A model's files other than weights: `SMALL_FILES`, further chat templates, and its own code."""
    patterns = (*SMALL_FILES, "additional_chat_templates/*.jinja", "*.py")
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def with_weights(name: str, source: str, names: Sequence[str], revision: str | None = None) -> Path:
    """The folder of `local_folder`, with the weight files of the first format that exists.

    Args:
        name, source, revision: see `local_folder`.
        names: formats, as in `qvlm_plugin.models.weights.weight_files`.
    """
    for file in names:
        stem, _, suffix = file.rpartition(".")
        patterns = (f"{stem}*.{suffix}", f"{file}.index.json")
        folder = local_folder(name, source, revision, (*SMALL_FILES, *patterns))
        if any(folder.glob(f"{stem}*.{suffix}")):
            break
    return folder


def create_repository(repository: str) -> None:
    """Create a model repository on the hub, unless it exists.

    Raises:
        QVLMError: the name is invalid, the user is not logged in or may not write there, or the hub cannot be reached.
    """
    with parsed_elsewhere(f"--push-to-hub {repository}: the hub refuses it (log in with hf auth login)"):
        HfApi().create_repo(repository, exist_ok=True)


def upload(folder: Path, repository: str) -> str:
    """Upload a folder's files to a repository; returns its address.

    Raises:
        QVLMError: the upload fails; the folder is kept.
    """
    with parsed_elsewhere(f"{folder} is written but not uploaded; hf upload {repository} {folder} tries again"):
        return str(HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Quantized checkpoint"))
