"""Check that logits are finite: a model that overflows its compute type ends in an error, not in wrong answers.

float16 ends at 65504. Larger values become infinite, and NaN after the next norm. Greedy decoding then repeats token 0,
which a harness scores like any other answer.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qvlm_plugin.errors import QVLMError

T = TypeVar("T")


class OverflowingModelError(QVLMError):
    """The model computes values that are not finite, and would do so on other documents, too."""


class _NotFiniteError(Exception):
    """The message names what is not finite."""


def finite(model: PreTrainedModel, run: Callable[[], T]) -> T:
    """Return the result of ``run``, which may run ``model`` any number of times.

    Only the logits of each forward pass are checked, which takes almost no time. If they are not finite, ``run`` is
    called a second time to find the first layer whose values are not.

    Raises:
        OverflowingModelError: logits of a token that is not padding are not finite; the message names the first layer.
    """
    try:
        with _removing([model.register_forward_hook(_check_logits, with_kwargs=True)]):
            return run()
    except _NotFiniteError as error:
        first = str(error)
    try:
        with _removing([handle for name, module in model.named_modules() for handle in _watch(name, module)]):
            run()
    except _NotFiniteError as error:
        first = str(error)
    dtype = str(model.dtype).removeprefix("torch.")
    advice = "; use dtype=bfloat16 or float32" if model.dtype == torch.float16 else ""
    raise OverflowingModelError(f"{first} not finite in {dtype}{advice}")


def _check_logits(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
    logits, mask = output.logits, kwargs.get("attention_mask")
    passes = logits.isfinite().all(dim=-1)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        passes |= mask[:, -passes.shape[1] :].to(passes.device) == 0
    if not passes.all():
        raise _NotFiniteError("the logits are")


def _watch(name: str, module: nn.Module) -> list[RemovableHandle]:
    """Hooks that raise if the module's inputs or outputs are not finite; the innermost of nested modules raises."""

    def check(kind: str, values: Any) -> None:
        if not all(map(_is_finite, tree_leaves(values))):
            culprit = "weights" if not all(map(_is_finite, module.parameters(recurse=False))) else kind
            raise _NotFiniteError(f"the {culprit} of {name or 'the model'} {'are' if culprit == 'weights' else 'is'}")

    return [
        module.register_forward_pre_hook(lambda module, args: check("input", args)),
        module.register_forward_hook(lambda module, args, output: check("output", output)),
    ]


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.is_meta or bool(value.isfinite().all())


@contextmanager
def _removing(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
