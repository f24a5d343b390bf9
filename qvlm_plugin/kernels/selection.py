"""Which kernel runs which module, and why other kernels cannot."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.base import Kernel


@dataclass(frozen=True)
class Choice:
    """The kernel of one module.

    Attributes:
        kernel: the first candidate that can run it.
        refused: names of the previous candidates, each with the reason why it cannot run the module.
        fell_back: whether a quantized weight got the last of several candidates.
    """

    kernel: Kernel
    refused: tuple[tuple[str, str], ...]
    fell_back: bool

    @property
    def reasons(self) -> str:
        """Why the other candidates cannot run the module, on one line."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.refused)


def choose(
    kernels: tuple[Kernel, ...],
    weight_format: WeightFormat,
    activation_format: ActivationFormat,
    shape: tuple[int, int],
    device: torch.device,
) -> Choice | None:
    """The first of ``kernels`` that can run a module; None if none can."""
    refused: list[tuple[str, str]] = []
    for index, kernel in enumerate(kernels):
        reason = kernel.obstacle(weight_format, activation_format, shape, device)
        if reason is None:
            fell_back = 0 < index == len(kernels) - 1 and weight_format.kind != "none"
            return Choice(kernel, tuple(refused), fell_back)
        refused.append((kernel.name, reason))
    return None


@dataclass(frozen=True)
class Execution:
    """The kernels of a quantized model: the choice for each of its quantized modules, by name."""

    choices: Mapping[str, Choice]

    @property
    def counts(self) -> dict[str, int]:
        """How many modules each kernel runs."""
        return dict(Counter(choice.kernel.name for choice in self.choices.values()).most_common())

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Names of the modules that fell back."""
        return tuple(name for name, choice in self.choices.items() if choice.fell_back)

    def require_no_fallback(self) -> None:
        """Check that no module fell back, for ``strict=true``.

        Raises:
            QVLMError: a module fell back; the message names the first.
        """
        if self.fallbacks:
            name = self.fallbacks[0]
            choice = self.choices[name]
            raise QVLMError(f"strict=true: {name} would fall back to {choice.kernel.name} ({choice.reasons})")

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.counts.items()) or "none"
        if not self.fallbacks:
            return f"quantized Linear layers by kernel: {counts}"
        first = self.fallbacks[0]
        return (
            f"quantized Linear layers by kernel: {counts}; {len(self.fallbacks)} fell back, for example {first} "
            f"({self.choices[first].reasons})"
        )
