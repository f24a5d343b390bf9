"""Read files from others: neither their content nor the file names in it are trusted."""

import json
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from qvlm_plugin.errors import QVLMError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has unpaired surrogates; or bytes are not UTF-8.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # raises unless surrogates come in pairs
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def parse_json_lines(blob: bytes) -> list[Any]:
    """The values of a JSON Lines file; blank lines are skipped.

    Only line feeds end a line, since a text may contain other separators such as U+2028.

    Raises:
        ValueError: a line is not JSON; the message gives its number. See `parse_json`.
    """
    values = []
    for number, line in enumerate(blob.decode("utf-8-sig").split("\n"), 1):
        try:
            values += [parse_json(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return values


def read_json(file: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError, ValueError: it cannot be read; see `parse_json`.
    """
    return parse_json(file.read_bytes())


@contextmanager
def parsed_elsewhere(message: str) -> Iterator[None]:
    """A context in which another library reads a file that may be damaged or hostile.

    Args:
        message: the beginning of the error message: what cannot be read.

    Raises:
        QVLMError: the library raises any exception; it may fail anywhere on values that it does not check.
    """
    try:
        yield
    except QVLMError:
        raise
    except Exception as error:
        raise QVLMError(f"{message}: {one_line(error)}") from error


@contextmanager
def concerning(note: str) -> Iterator[None]:
    """A context for work on one file or row, which adds ``note`` to unexpected exceptions."""
    try:
        yield
    except QVLMError:
        raise
    except Exception as error:
        error.add_note(note)
        raise


def one_line(error: Exception) -> str:
    """The message of an error, shortened and in one line, for use in another message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def inside(folder: Path, name: Any, source: str) -> Path:
    """The path of a file in ``folder`` or below it.

    A name in composed Unicode form finds a file whose name is decomposed, as macOS writes it, and the other way round.

    Args:
        folder: the folder that may be read.
        name: name of the file, from another file's content.
        source: where the name comes from, for the message.

    Raises:
        QVLMError: the name is not text, or leads out of the folder.
    """
    # No name has control characters or unpaired surrogates; macOS writes names with spaces of several kinds.
    if isinstance(name, str) and name and not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        path = PurePath(name)
        if not path.is_absolute() and ".." not in path.parts:
            paths = [folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
            return next((found for found in (folder / path, *paths) if os.path.exists(found)), folder / path)
    raise QVLMError(f"{source}: {name!r:.200} is not the name of a file in {str(folder)!r} or below it")
