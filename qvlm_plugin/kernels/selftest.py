"""Self-tests of kernels on a device: private operators differ between versions of torch and between devices.

Each test is a small problem on which every kernel should equal the reference: static steps are the same for all
channels, so that folding them loses nothing. For weights of more than 4 bits they differ between the two halves of the
channels, so that these are multiplied as two segments.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.quantizers import nearest_codes, stored_parameters

SHAPE = (64, 256)
"""Shape of the weight."""
_TOKENS = (1, 3, 70)
"""Numbers of tokens: one, few and many, for which kernels use different operators."""

_STEP = 0.25


@cache
def self_test(
    kernel: Kernel, weight_format: WeightFormat, activation_format: ActivationFormat, device: torch.device
) -> str | None:
    """Compare a kernel with the reference on a small problem, in every compute type.

    Returns:
        What went wrong, in a few words; None if the outputs agree. Results are cached for the process.
    """
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(SHAPE, generator=generator) / 16, torch.randn(SHAPE[0], generator=generator)
    inputs = torch.randn(max(_TOKENS), SHAPE[1], generator=generator)
    parameters = _parameters(weight, weight_format, activation_format)
    parameters = {name: value.to(device) for name, value in parameters.items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        operands = [operand.to(device, dtype) for operand in (weight, bias)]
        try:
            outputs, expected = (
                _outputs(tested, *operands, inputs.to(device, dtype), weight_format, activation_format, parameters)
                for tested in (kernel, REFERENCE)
            )
        except Exception as error:  # a private operator may fail in any way
            return f"{type(error).__name__} in {dtype}: {' '.join(str(error).split())[:200]}"
        for count, output, target in zip(_TOKENS, outputs.split(_TOKENS), expected.split(_TOKENS), strict=True):
            distance = float((output - target).norm() / target.norm())
            if not distance <= kernel.tolerance:
                return f"outputs differ from the reference by {distance:.2g} in {dtype} for {count} tokens"
    return None


def skipped_on_failure(kernel: Kernel) -> Kernel:
    """The kernel, with a failed self-test as one more obstacle: `choose` then skips it."""
    return _tested(kernel, lambda failure, *problem: f"self-test failed: {failure}")


def required_to_pass(kernel: Kernel) -> Kernel:
    """The kernel, which raises a `QVLMError` when it is chosen for a problem whose self-test it fails."""

    def refuse(
        failure: str, weight_format: WeightFormat, activation_format: ActivationFormat, device: torch.device
    ) -> str:
        raise QVLMError(
            f"backend=packed: kernel {kernel.name} fails its self-test on {device} ({weight_format}, "
            f"{activation_format}): {failure}; backend=auto skips it"
        )

    return _tested(kernel, refuse)


def _tested(kernel: Kernel, failed: Callable[[str, WeightFormat, ActivationFormat, torch.device], str]) -> Kernel:
    """The kernel with one more obstacle: if it fails a self-test, what ``failed`` returns for this failure."""

    def obstacle(
        weight_format: WeightFormat, activation_format: ActivationFormat, shape: tuple[int, int], device: torch.device
    ) -> str | None:
        if reason := kernel.obstacle(weight_format, activation_format, shape, device):
            return reason
        problem = weight_format, activation_format, device
        failure = self_test(kernel, *problem)
        return failure and failed(failure, *problem)

    return replace(kernel, obstacle=obstacle)


def _parameters(weight: Tensor, weight_format: WeightFormat, activation_format: ActivationFormat) -> dict[str, Tensor]:
    levels = 2**activation_format.bits - 1
    step = torch.full((SHAPE[1],), _STEP)
    if weight_format.bits > 4:
        step[: SHAPE[1] // 2] /= 16
    lower = -step * (levels // 2 + torch.arange(SHAPE[1]) % 2)
    values = {
        "lower": lower,
        "upper": lower + step * levels,
        "clip_ratio": torch.ones(1),
        "center": _STEP * (torch.arange(SHAPE[1]) % 5).float(),
        "clip": torch.ones(SHAPE[0], weight_format.groups(SHAPE) // SHAPE[0] or 1),
    }
    if weight_format.stored:
        values |= stored_parameters(nearest_codes(weight, weight_format), weight_format)
    return {name: values[name] for name in (*weight_format.parameters, *activation_format.parameters)}


@torch.no_grad()
def _outputs(
    kernel: Kernel,
    weight: Tensor,
    bias: Tensor,
    inputs: Tensor,
    weight_format: WeightFormat,
    activation_format: ActivationFormat,
    parameters: dict[str, Tensor],
) -> Tensor:
    """The outputs for all numbers of tokens, concatenated: float32 on the CPU."""
    neutral = kernel.prepare(weight, bias, weight_format, activation_format, parameters)
    tensors = kernel.pack(neutral, activation_format, weight.device)
    outputs = [kernel.forward(inputs[:tokens], tensors, activation_format) for tokens in _TOKENS]
    return torch.cat(outputs).float().cpu()
