"""Helpers for gradients through a full-precision or quantized model: loss scaling, freezing, checkpointing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.replacements import other_forward

LOSS_SCALE = 2.0**12
"""Factor of losses in the backward pass, so that small gradients do not underflow in float16; exact in other types."""

_SMALLEST_SCALE = 2.0**-8

Outcome = TypeVar("Outcome")


class OverflowedError(QVLMError):
    """A gradient is not finite: it overflowed, or the forward pass is not finite itself."""


def with_loss_scale(run: Callable[[float], Outcome]) -> Outcome:
    """The result of ``run`` with the largest loss scale at which it does not raise `OverflowedError`.

    Args:
        run: multiplies a loss by the scale, runs the backward pass, and divides gradients by the scale. Scales are
            powers of two: without over- and underflow the result does not depend on them.

    Raises:
        OverflowedError: it overflows at every scale.
    """
    scale = LOSS_SCALE
    while True:
        try:
            return run(scale)
        except OverflowedError:
            if scale <= _SMALLEST_SCALE:
                raise
        scale /= 4


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """While active, no parameter of the model takes gradients."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield
    finally:
        for name, flag in flags.items():  # by name: an offloaded parameter is another object after each use
            model.get_parameter(name).requires_grad_(flag)


@contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While active, the backward pass recomputes each block. (transformers' own switch works in train mode only.)"""

    def checkpointing(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)

    # Stopping early inside a module would leave its offloaded weights on the device.
    with other_forward(blocks, checkpointing), set_checkpoint_early_stop(False):
        yield


def last_positions(tokens: Tensor, count: int) -> Tensor:
    """The last ``count`` positions of ``tokens`` [B, T], as `logits_to_keep` of a model: int64 [count].

    With the number itself the model would slice its hidden states, and for a batch that is not contiguous autograd
    copies the head's weight for each row.
    """
    return torch.arange(tokens.shape[1] - count, tokens.shape[1])


def require_answers(calibration: CalibrationSet, purpose: str, remedy: str) -> None:
    """Check that every sample has an answer.

    Raises:
        QVLMError: some samples have none for ``purpose``; the message suggests the argument ``remedy``.
    """
    if without := sum(not sample.answer.strip() for sample in calibration.samples):
        raise QVLMError(
            f"calibration={calibration.source!r}: {without} of {len(calibration.samples)} samples have no answer for "
            f"{purpose}; choose a split with answers, or {remedy}"
        )
