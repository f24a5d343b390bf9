"""Quantization schemes: the bit widths of the weights and activations of each part of a vision-language model.

A scheme is written ``w<bits>a<bits>``, optionally followed by overrides for single parts::

    w4a4
    w4a16
    w4a4+vision:w8a8+projector:w16a16

``+`` and ``:`` survive the comma-splitting of lmms-eval's ``--model_args`` and need no quoting in a shell; ``,`` and
``=`` are accepted in their place where nothing splits them (Python, JSON).
"""

import re
from dataclasses import dataclass, fields

from qvlm_plugin.errors import QVLMError

UNQUANTIZED = 16
"""The width that stands for "not quantized": the tensor stays in the compute type."""

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class BitWidths:
    """Bits per weight and per activation element; 16 leaves the tensor in the compute type."""

    weight: int
    activation: int

    @property
    def is_identity(self) -> bool:
        """Whether nothing is quantized."""
        return self.weight == UNQUANTIZED and self.activation == UNQUANTIZED

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


@dataclass(frozen=True)
class Scheme:
    """Bit widths of the three parts of a vision-language model."""

    decoder: BitWidths
    vision: BitWidths
    projector: BitWidths

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read ``"w4a4"`` or ``"w4a4+vision:w8a8"``.

        Raises:
            QVLMError: the text does not parse, names an unknown part, or has a width outside 2-8 and 16.
        """
        default, *overrides = re.split(r"[+,]", str(text).strip().lower())
        widths = dict.fromkeys(PARTS, _parse_widths(default, text))
        overridden = set()
        for override in overrides:
            part, separator, value = re.sub("=", ":", override).partition(":")
            if not separator or part not in PARTS or part in overridden:
                raise QVLMError(
                    f"scheme={text!r}: {override!r} is not an override; write PART:wXaY once for each PART of "
                    f"{', '.join(PARTS)}, for example w4a4+vision:w8a8+projector:w16a16"
                )
            widths[part] = _parse_widths(value, text)
            overridden.add(part)
        return cls(**widths)

    def __str__(self) -> str:
        overrides = [f"+{part}:{getattr(self, part)}" for part in PARTS if getattr(self, part) != self.decoder]
        return str(self.decoder) + "".join(overrides)


PARTS = tuple(field.name for field in fields(Scheme))
"""The parts of a model that a scheme covers: ``decoder``, ``vision``, ``projector``."""


def _parse_widths(value: str, text: str) -> BitWidths:
    match = re.fullmatch(r"w([0-9]{1,2})a([0-9]{1,2})", value)
    if not match:
        raise QVLMError(f"scheme={text!r}: {value!r} is not of the form wXaY, for example w4a4 or w4a16")
    weight, activation = (int(bits) for bits in match.groups())
    for bits in (weight, activation):
        if not (MIN_BITS <= bits <= MAX_BITS or bits == UNQUANTIZED):
            raise QVLMError(f"scheme={text!r}: {bits} bits; allowed are {MIN_BITS} to {MAX_BITS}, and {UNQUANTIZED}")
    return BitWidths(weight, activation)
