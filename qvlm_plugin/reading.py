"""Read files that others wrote: their content is not trusted, and neither are the file names in it."""

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
        ValueError: it is none, is nested too deeply, or holds text that is not Unicode; bytes are not UTF-8.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # an error unless they come in pairs
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def parse_json_lines(blob: bytes) -> list[Any]:
    """The values of a JSON Lines file; blank lines are left out.

    Only line feeds end a line: a text may hold other separators, as U+2028.

    Raises:
        ValueError: a line is no JSON text, and the message says which; see `parse_json`.
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
def parsed_elsewhere(what: str) -> Iterator[None]:
    """Around another library's reading of a file that may be damaged or hostile.

    Args:
        what: is being read, and how it fails: the beginning of the message.

    Raises:
        QVLMError: it fails, in whatever way: the library meets values that it never checked.
    """
    try:
        yield
    except QVLMError:
        raise
    except Exception as error:
        raise QVLMError(f"{what}: {one_line(error)}") from error


@contextmanager
def concerning(what: str) -> Iterator[None]:
    """Around work on one file or row: an exception that nobody expected has a note that says ``what``."""
    try:
        yield
    except QVLMError:
        raise
    except Exception as error:
        error.add_note(what)
        raise


def one_line(error: Exception) -> str:
    """What an error says, short and in one line, for the message of another."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def inside(folder: Path, name: Any, source: str) -> Path:
    """The path of a file in ``folder`` or below it.

    A name of composed letters finds a file of decomposed ones, which macOS writes, and the other way round.

    Args:
        folder: that may be read.
        name: of the file, as another file gives it.
        source: what gives it, for the message.

    Raises:
        QVLMError: the name is not text, or leads out of the folder.
    """
    # Control characters and halves of surrogate pairs are in no name; spaces of all kinds are, as macOS writes them.
    if isinstance(name, str) and name and not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        path = PurePath(name)
        if not path.is_absolute() and ".." not in path.parts:
            paths = [folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
            return next((found for found in (folder / path, *paths) if os.path.exists(found)), folder / path)
    raise QVLMError(f"{source}: {name!r:.200} is not the name of a file in {str(folder)!r} or below it")
