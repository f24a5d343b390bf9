"""Wrapping functions of lmms-eval where it offers no hook."""

import functools
from collections.abc import Callable
from types import ModuleType


def wrap_once(owner: type | ModuleType, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace ``owner.name`` by what ``wrapper`` makes of it. Repeating it changes nothing."""
    original = getattr(owner, name)
    if not hasattr(original, "wrapped_by_qvlm"):
        wrapped = functools.wraps(original)(wrapper(original))
        wrapped.wrapped_by_qvlm = True
        setattr(owner, name, wrapped)
