"""Where lmms-eval offers no hook, and where versions of it and of its data library differ.

README.md has the table of versions that are tested.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from PIL import ImageFile

from qvlm_plugin.errors import QVLMError


def wrap_once(owner: type | ModuleType, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace ``owner.name`` by what ``wrapper`` makes of it. Repeating it changes nothing."""
    original = getattr(owner, name)
    wrappers = getattr(original, "wrapped_by_qvlm", ())
    if wrapper not in wrappers:
        wrapped = functools.wraps(original)(wrapper(original))
        wrapped.wrapped_by_qvlm = (*wrappers, wrapper)
        setattr(owner, name, wrapped)


def takes_losses(process_results: Callable) -> bool:
    """Whether this method of lmms-eval's tasks takes the choice of the lowest number for the likeliest, as 0.7 does."""
    return "np.argmin(lls)" in inspect.getsource(process_results)


def set_response_key(cache: Any, key: str) -> None:
    """Let lmms-eval's response cache tell models apart by ``key``, a hash.

    Raises:
        QVLMError: this version's cannot.
    """
    if not hasattr(cache, "_model_fingerprint_hash"):
        raise QVLMError("--use_cache does not work with this version of lmms-eval; leave it out")
    cache._model_fingerprint_hash = key


def require_whole_images() -> None:
    """Let truncated images be errors: lmms-eval has Pillow fill them up with grey, in every task."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False


def answers_of(column: Any) -> list[str]:
    """Several people's answers: a list of texts or records, or, by some versions of datasets, a record of lists."""
    if isinstance(column, Mapping):
        column = column["answer"]
    return [answer["answer"] if isinstance(answer, Mapping) else answer for answer in column]
