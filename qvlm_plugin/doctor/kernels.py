"""The self-test of every packed kernel on every device."""

import itertools

import torch

from qvlm_plugin import backends
from qvlm_plugin.doctor.finding import Finding, Status
from qvlm_plugin.formats import ActivationFormat
from qvlm_plugin.kernels.base import Kernel
from qvlm_plugin.kernels.selftest import SHAPE, self_test
from qvlm_plugin.methods.options import MethodOptions

_INPUTS = tuple(
    ActivationFormat(kind=kind, bits=bits)
    for kind, bits in (
        ("none", 16), ("static_channel", 4), ("static_channel", 8), ("dynamic_token", 4), ("dynamic_token", 8),
    )
)  # fmt: skip
_WEIGHTS = tuple(
    MethodOptions(weights=kind, group_scales=scales).weight_format(bits)
    for kind, scales, bits in (("int", "free", 4), ("int", "progressive", 4), ("int", "free", 8), ("nf", "free", 4))
)


def check_kernels() -> list[Finding]:
    """A finding for each packed kernel and device."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    return [_check(kernel, device) for device in devices for kernel in _packed()]


def _packed() -> list[Kernel]:
    return [kernel for kernel in backends.all_kernels().values() if kernel.name != "reference"]


def _check(kernel: Kernel, device: torch.device) -> Finding:
    subject = f"kernel {kernel.name} on {device}"
    reasons = {problem: kernel.obstacle(*problem, SHAPE, device) for problem in itertools.product(_WEIGHTS, _INPUTS)}
    problems = [problem for problem, reason in reasons.items() if reason is None]
    for weight_format, activation_format in problems:
        if failure := self_test(kernel, weight_format, activation_format, device):
            message = f"self-test failed ({weight_format}, {activation_format}): {failure}"
            return Finding(subject, Status.WARN, message, "backend=auto skips it; try another version of torch")
    if problems:
        return Finding(subject, Status.OK, f"self-test passed for {len(problems)} formats")
    message = f"cannot run: {'; '.join(dict.fromkeys(reasons.values()))}"
    return Finding(subject, Status.WARN, message, "backend=auto skips it")
