"""Patches where lmms-eval has no hook, and differences between versions of lmms-eval and datasets.

README.md lists the tested versions.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from PIL import ImageFile

from qvlm_plugin.errors import QVLMError


def wrap_once(owner: type | ModuleType, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace ``owner.name`` by ``wrapper(owner.name)``. Idempotent."""
    original = getattr(owner, name)
    wrappers = getattr(original, "wrapped_by_qvlm", ())
    if wrapper not in wrappers:
        wrapped = functools.wraps(original)(wrapper(original))
        wrapped.wrapped_by_qvlm = (*wrappers, wrapper)
        setattr(owner, name, wrapped)


def takes_losses(process_results: Callable) -> bool:
    """Whether this method of lmms-eval's tasks picks the choice with the lowest number, as 0.7 does."""
    return "np.argmin(lls)" in inspect.getsource(process_results)


def set_response_key(cache: Any, key: str) -> None:
    """Set the hash by which lmms-eval's response cache distinguishes models.

    Raises:
        QVLMError: this version of lmms-eval has no such hash.
    """
    if not hasattr(cache, "_model_fingerprint_hash"):
        raise QVLMError("--use_cache does not work with this version of lmms-eval; leave it out")
    cache._model_fingerprint_hash = key


def require_whole_images() -> None:
    """Make truncated images errors: lmms-eval configures Pillow to fill them with grey, for every task."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False


def answers_of(column: Any) -> list[str]:
    """Annotators' answers from a list of texts or records or, in some versions of datasets, a record of lists."""
    if isinstance(column, Mapping):
        column = column["answer"]
    return [answer["answer"] if isinstance(answer, Mapping) else answer for answer in column]
