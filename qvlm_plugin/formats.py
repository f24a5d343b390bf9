"""The formats a weight or an activation can be quantized to: a small closed vocabulary, as data."""

from math import ceil
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qvlm_plugin.scheme import MAX_BITS, MIN_BITS, UNQUANTIZED

NF_BLOCK = 64
"""Weights per normal-float scale (QLoRA, section 3)."""

SCALE_BLOCK = 256
"""Normal-float scales per second-level scale under double quantization (QLoRA, section 3)."""


class _Format(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(UNQUANTIZED, ge=MIN_BITS, le=UNQUANTIZED)

    @model_validator(mode="after")
    def _bits_match_kind(self) -> "_Format":
        if (self.kind == "none") != (self.bits == UNQUANTIZED) or MAX_BITS < self.bits < UNQUANTIZED:
            raise ValueError(f"{self.bits} bits do not go with kind {self.kind!r}")
        return self


class WeightFormat(_Format):
    """How a weight is stored.

    Attributes:
        kind: ``none`` (compute type), ``int`` (uniform), ``nf`` (normal-float codebook, blocks of 64).
        bits: width of a code.
        group_size: for ``int``: input channels that share a scale; None shares it along each output channel.
        symmetric: for ``int``: no fitted zero point.
        double_quantization: for ``nf``: the block scales are themselves quantized to 8 bits.
        clipped: the groups' ranges are narrowed by a parameter ``clip`` (one factor in (0, 1] for each group).
        corrected: the bias makes up for what rounding the weight adds to the mean output; takes the site's parameter
            ``mean`` [in_features], the mean input.
    """

    kind: Literal["none", "int", "nf"] = "none"
    group_size: int | None = Field(None, ge=1)
    symmetric: bool = False
    double_quantization: bool = False
    clipped: bool = False
    corrected: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors a plan holds for each Linear of this format."""
        return ("clip",) if self.clipped else ()

    @property
    def site_parameters(self) -> tuple[str, ...]:
        """Names of the tensors a plan holds for the site of a Linear of this format."""
        return ("mean",) if self.corrected else ()

    def groups(self, shape: tuple[int, int]) -> int:
        """How many scales a weight of this shape has."""
        rows, columns = shape
        if self.kind == "nf":
            return ceil(rows * columns / NF_BLOCK)
        return rows * (ceil(columns / self.group_size) if self.group_size else 1)

    def effective_bits(self, shape: tuple[int, int]) -> float:
        """Bits per weight when packed: the code and its share of 16-bit scales, zero points and block scales."""
        if self.kind == "int":
            metadata = 16 + (0 if self.symmetric else self.bits)
            return self.bits + metadata * self.groups(shape) / (shape[0] * shape[1])
        if self.kind == "nf":
            scale = 8 + 32 / SCALE_BLOCK if self.double_quantization else 32
            return self.bits + scale / NF_BLOCK
        return float(UNQUANTIZED)

    def __str__(self) -> str:
        if self.kind == "none":
            return "weight unquantized"
        if self.kind == "nf":
            return f"nf{self.bits}" + (" double-quantized" if self.double_quantization else "")
        return f"int{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} g{self.group_size or 'channel'}"


class ActivationFormat(_Format):
    """How the input of a Linear is rounded, and which parameters that takes.

    Attributes:
        kind: ``none``; ``static_channel`` - fixed bounds ``lower`` and ``upper`` [in_features] for each channel (RPTQ,
            for the language model); ``dynamic_token`` - each token's own extremes, pulled in by ``clip_ratio`` (Outlier
            Suppression, for the vision tower and the projector).
        bits: width of a code.
    """

    kind: Literal["none", "static_channel", "dynamic_token"] = "none"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors a plan holds for each site of this format."""
        return {"none": (), "static_channel": ("lower", "upper"), "dynamic_token": ("clip_ratio",)}[self.kind]

    def __str__(self) -> str:
        return "activation unquantized" if self.kind == "none" else f"{self.kind} {self.bits}-bit"
