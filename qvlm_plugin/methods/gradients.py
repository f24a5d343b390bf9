"""What taking gradients through a quantized or full-precision model needs besides autograd."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.stand_ins import other_forward

LOSS_SCALE = 2.0**12
"""Factor of losses while going backwards, so that float16 does not lose small gradients; exact in the other types."""

_SMALLEST_SCALE = 2.0**-8

Outcome = TypeVar("Outcome")


class OverflowedError(QVLMError):
    """A gradient is not finite: it exceeded its type, or the model itself computes what is not finite."""


def scaled(run: Callable[[float], Outcome]) -> Outcome:
    """What ``run`` makes with the largest loss scale at which it does not raise `OverflowedError`.

    Args:
        run: goes backwards from a loss times the scale, and divides gradients by it. Scales are powers of two: where
            nothing over- or underflows, its outcome does not depend on them.

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
    """While active, the backward pass runs each block again. (transformers' own switch works in train mode only.)"""

    def checkpointing(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)

    # Stopping within a module would leave its offloaded weights here.
    with other_forward(blocks, checkpointing), set_checkpoint_early_stop(False):
        yield


def last_positions(tokens: Tensor, count: int) -> Tensor:
    """The last ``count`` positions of ``tokens`` [B, T], as `logits_to_keep` of a model: int64 [count].

    The number itself would make the model slice its hidden states, and autograd copies the head's weight for each row
    of a batch that is not contiguous.
    """
    return torch.arange(tokens.shape[1] - count, tokens.shape[1])


def require_answers(calibration: CalibrationSet, purpose: str, remedy: str) -> None:
    """Check that every sample has an answer.

    Raises:
        QVLMError: some have none for ``purpose``; the message offers the argument ``remedy`` as a way out.
    """
    if without := sum(not sample.answer.strip() for sample in calibration.samples):
        raise QVLMError(
            f"calibration={calibration.source!r}: {without} of {len(calibration.samples)} samples have no answer for "
            f"{purpose}; choose a split with answers, or {remedy}"
        )
