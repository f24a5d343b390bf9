"""The formats to which a weight or an activation can be quantized, as data."""

from math import ceil
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from qvlm_plugin.scheme import MAX_BITS, MIN_BITS, UNQUANTIZED

LARGEST_PRODUCT = 127
"""Largest magnitude of ``multiple * (code - zero_point)`` with progressive scales: a signed 8-bit integer."""

NF_BLOCK = 64
"""Weights per normal-float scale (QLoRA, section 3)."""

SCALE_BLOCK = 256
"""Normal-float scales per second-level scale under double quantization (QLoRA, section 3)."""

PROGRESSIVE_BITS = 4
"""Widest code that progressive scales allow: with wider ones too few multiples fit into 8 bits."""

NORMAL_REACH = {2: 1.494, 3: 2.051, 4: 2.514, 5: 2.916, 6: 3.278, 7: 3.611, 8: 3.922}
"""By bits: the distance from the mean, in standard deviations, of the outermost of 2^bits evenly spaced points that
round a normal distribution with the least squared error (Max, 1960, "Quantizing for minimum distortion", table II, for
up to 5 bits; found by minimizing the same error for more)."""

_NEWER = ("stored", "clip_magnitude", "progressive")
"""Fields that the first version of a weight's format lacks."""


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
        group_size: for ``int``: input channels that share a scale; None: one scale for each output channel.
        symmetric: for ``int``: the zero point is the middle code, not fitted.
        double_quantization: for ``nf``: the block scales are quantized to 8 bits, too.
        progressive: for ``int`` of up to 4 bits with groups: the scales of an output channel's groups are whole
            multiples of one unit, small enough for ``multiple * (code - zero_point)`` to be a signed 8-bit integer
            (after QServe, Lin et al., 2024, section 4.1). One integer product then serves all groups.
        clipped: the groups' ranges are narrowed by a parameter ``clip`` (one factor in (0, 1] for each group).
        clip_magnitude: for ``int`` without ``symmetric``: the factor multiplies the group's largest magnitude, and both
            ends are cut there (as AWQ's code does); otherwise it multiplies each end.
        corrected: the bias is corrected by the mean output error that rounding the weight causes; uses the site's
            parameter ``mean`` [in_features], the mean of the input that is rounded (after folds and rotations).
        stored: the plan holds the codes of the weight (after folds and rotations) and their scales as parameters:
            ``codes`` (uint8 [out_features, bytes], see `packing`); for ``int`` ``scales`` (floating [out_features,
            groups], positive) or, where ``progressive``, ``units`` (floating [out_features, 1], positive) and
            ``multiples`` (uint8 [out_features, groups]), and, unless ``symmetric``, ``zero_points`` (uint8
            [out_features, groups]); for ``nf`` ``absmax`` (float32 [groups], not negative), the block scales before
            double quantization. Without it, the weight is rounded to nearest when the plan is applied.
    """

    kind: Literal["none", "int", "nf"] = "none"
    group_size: int | None = Field(None, ge=1)
    symmetric: bool = False
    double_quantization: bool = False
    progressive: bool = False
    clipped: bool = False
    clip_magnitude: bool = False
    corrected: bool = False
    stored: bool = False

    @model_validator(mode="after")
    def _multiples_fit(self) -> "WeightFormat":
        if self.progressive and (self.kind != "int" or self.bits > PROGRESSIVE_BITS):
            raise ValueError(f"progressive scales need kind 'int' of up to {PROGRESSIVE_BITS} bits")
        return self

    @model_validator(mode="after")
    def _codes_have_scales(self) -> "WeightFormat":
        if self.stored and (self.kind == "none" or self.clipped):
            raise ValueError(
                "stored codes need a quantized weight, and exclude clip: their scales are stored with them"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out newer fields that are false, so that plans of older versions keep their hashes."""
        content = serialize(self)
        return {name: value for name, value in content.items() if name not in _NEWER or value}

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors a plan holds for each Linear of this format."""
        if self.stored and self.kind == "nf":
            return ("codes", "absmax")
        if self.stored:
            scales = ("units", "multiples") if self.progressive else ("scales",)
            return ("codes", *scales) if self.symmetric else ("codes", *scales, "zero_points")
        return ("clip",) if self.clipped else ()

    @property
    def site_parameters(self) -> tuple[str, ...]:
        """Names of the tensors a plan holds for the site of a Linear of this format."""
        return ("mean",) if self.corrected else ()

    def groups(self, shape: tuple[int, int]) -> int:
        """The number of scales that a weight of this shape has."""
        rows, columns = shape
        if self.kind == "nf":
            return ceil(rows * columns / NF_BLOCK)
        return rows * (ceil(columns / self.group_size) if self.group_size else 1)

    def effective_bits(self, shape: tuple[int, int]) -> float:
        """Bits per weight when packed: the code and its share of 16-bit scales, zero points and block scales.

        Kernels count in the same way. A plan's file is larger if codes have 3, 5, 6 or 7 bits: each takes a byte.
        """
        if self.kind == "int":
            scale, unit = (8, 16 * shape[0]) if self.progressive else (16, 0)
            metadata = scale + (0 if self.symmetric else self.bits)
            return self.bits + (metadata * self.groups(shape) + unit) / (shape[0] * shape[1])
        if self.kind == "nf":
            scale = 8 + 32 / SCALE_BLOCK if self.double_quantization else 32
            return self.bits + scale / NF_BLOCK
        return float(UNQUANTIZED)

    def __str__(self) -> str:
        if self.kind == "none":
            return "weight unquantized"
        if self.kind == "nf":
            kind = f"nf{self.bits}" + (" double-quantized" if self.double_quantization else "")
        else:
            kind = f"int{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} g{self.group_size or 'channel'}"
            kind += " progressive" if self.progressive else ""
        return f"{kind} stored" if self.stored else kind


def stored_format(weight_format: WeightFormat) -> WeightFormat:
    """The same format with its codes stored in the plan; the stored scales include any clipping."""
    changes = {"stored": True, "clipped": False, "clip_magnitude": False}
    return WeightFormat.model_validate(weight_format.model_dump() | changes)


def clipped_format(weight_format: WeightFormat) -> WeightFormat:
    """The same format with clipped group ranges."""
    two_ends = weight_format.kind == "int" and not weight_format.symmetric
    return weight_format.model_copy(update={"clipped": True, "clip_magnitude": two_ends})


class ActivationFormat(_Format):
    """How the input of a Linear is rounded, and with which parameters.

    Attributes:
        kind: ``none``; ``static_channel`` - fixed bounds ``lower`` and ``upper`` [in_features] for each channel (RPTQ,
            for the language model); ``dynamic_token`` - each token's own extremes, narrowed by ``clip_ratio`` (Outlier
            Suppression, for the vision tower and the projector).
        bits: width of a code.
        centered: for ``dynamic_token``: ``center`` [in_features], the mean input of each channel in calibration, is
            subtracted before rounding and added again (after Wei et al., 2023, "Outlier Suppression+").
        normal: for ``dynamic_token``: bounds are `reach` times ``clip_ratio`` standard deviations of the token from its
            mean, and at most the token's extremes. Most rotated tokens are nearly normal; the extremes of a massive one
            are nearer, so it is not clipped.
    """

    kind: Literal["none", "static_channel", "dynamic_token"] = "none"
    centered: bool = False
    normal: bool = False

    @model_validator(mode="after")
    def _changes_tokens(self) -> "ActivationFormat":
        if (self.centered or self.normal) and self.kind != "dynamic_token":
            raise ValueError("centered and normal activations are of kind 'dynamic_token'")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out newer fields that are false, so that plans of older versions keep their hashes."""
        content = serialize(self)
        return {name: value for name, value in content.items() if name not in ("centered", "normal") or value}

    @property
    def reach(self) -> float | None:
        """Standard deviations between a token's mean and its bounds at a clip ratio of 1; None: to the extremes."""
        return NORMAL_REACH[self.bits] if self.normal else None

    @property
    def largest_ratio(self) -> float:
        """The largest useful clip ratio: 1 if ranges end at the tokens' extremes."""
        return 2.0 if self.normal else 1.0

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors a plan holds for each site of this format."""
        names = {"none": (), "static_channel": ("lower", "upper"), "dynamic_token": ("clip_ratio",)}[self.kind]
        return (*names, "center") if self.centered else names

    def __str__(self) -> str:
        if self.kind == "none":
            return "activation unquantized"
        return f"{self.kind} {self.bits}-bit" + " centered" * self.centered + " normal" * self.normal
