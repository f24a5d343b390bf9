"""The options of methods: one class for each group of choices, and `MethodOptions`, which has all of them.

A method is a preset: these options with its own defaults (`qvlm_plugin.builtin`). Every method accepts every option, so
that two rows of a comparison can differ in a single choice.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qvlm_plugin.formats import PROGRESSIVE_BITS, ActivationFormat, WeightFormat
from qvlm_plugin.scheme import UNQUANTIZED

CLIP_STEP = 0.05
"""Distance between clipping factors, from 1 downwards."""


def grid_from_one(minimum: float, step: float) -> tuple[float, ...]:
    """Candidates from 1 down, ``step`` apart, none below ``minimum``."""
    count = int((1 - minimum) / step + 1e-9) + 1
    return tuple(round(1 - index * step, 6) for index in range(count))


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NoOptions(_Options):
    """No options: the model stays in full precision."""

    def weight_format(self, bits: int) -> WeightFormat:
        """Unquantized."""
        return WeightFormat()

    def activation_format(self, part: str, bits: int) -> ActivationFormat:
        """Unquantized."""
        return ActivationFormat()


class FormatOptions(_Options):
    """Formats of weights and activations.

    Attributes:
        weights: number format of the weights: uniform integers (``int``), or a normal-float codebook (``nf``).
        group_size: for ``int`` weights: input channels that share a scale; -1: one scale per output channel.
        symmetric: for ``int`` weights: the zero point is the middle code, not fitted.
        group_scales: for ``int`` weights of up to 4 bits: scales of groups are ``free``, or ``progressive``: whole
            multiples of their output channel's unit, so that one integer product serves all groups.
        double_quantization: for ``nf`` weights: quantize the block scales, too.
        activations: how the language model's activations are rounded: per ``channel`` within bounds fixed in
            calibration (paper, section 4.3), or per ``token`` within its own extremes, as in the visual part.
        center: subtract the calibration mean of each channel before a token is rounded. Not in the paper.
    """

    weights: Literal["int", "nf"] = "int"
    group_size: int = Field(128, ge=-1)
    symmetric: bool = False
    group_scales: Literal["free", "progressive"] = "free"
    double_quantization: bool = True
    activations: Literal["channel", "token"] = "channel"
    center: bool = False

    def weight_format(self, bits: int) -> WeightFormat:
        """The format of a weight of ``bits`` bits."""
        if bits == UNQUANTIZED:
            return WeightFormat()
        if self.weights == "nf":
            return WeightFormat(kind="nf", bits=bits, double_quantization=self.double_quantization)
        group_size = self.group_size if self.group_size > 0 else None
        progressive = self.group_scales == "progressive" and group_size is not None and bits <= PROGRESSIVE_BITS
        return WeightFormat(
            kind="int", bits=bits, group_size=group_size, symmetric=self.symmetric, progressive=progressive
        )

    def activation_format(self, part: str, bits: int) -> ActivationFormat:
        """The format of a part's activations of ``bits`` bits.

        In the language model activations vary most across channels, in the visual part (to which the projector's inputs
        belong) across tokens; the quantizers follow this (paper, section 4.3).
        """
        if bits == UNQUANTIZED:
            return ActivationFormat()
        static = part == "decoder" and self.activations == "channel"
        return ActivationFormat(kind="static_channel" if static else "dynamic_token", bits=bits)


class TransformOptions(_Options):
    """Transformations of the inputs of Linears that leave the full-precision model unchanged.

    Attributes:
        transform: ``awq`` scales channels to reduce weight errors, and clips the weights (Lin et al., 2023); ``smooth``
            moves the magnitude of channels into the weights (Xiao et al., 2023, "SmoothQuant"); ``rotate`` multiplies
            inputs by an orthogonal matrix, which spreads massive channels over all (Ashkboos et al., 2024, "QuaRot");
            ``smooth+rotate`` does both in this order.
        alpha_steps: for ``awq``: number of exponents tried for a site's scale, evenly spaced from 0 to below 1; 1
            switches scaling off.
        min_clip: for ``awq`` and ``weight_clip``: the narrowest weight range tried, as a share of the whole range; 1
            switches clipping off.
        duo_scaling: for ``awq``: a site's scale depends on the magnitudes of its weights too: mean|x|^α / mean|w|^(1-α)
            (AutoAWQ). False: mean|x|^α, as in the paper.
        search_tokens: for ``awq``: calibration tokens of each site on which errors are measured.
        smooth_alpha: for ``smooth``: exponent α, the share of a channel's magnitude that moves (SmoothQuant, Eq. 4).
        smooth_by: for ``smooth``: the magnitude of a channel is its maximum (``max``, SmoothQuant), or the root mean
            square of its tokens, without massive ones, and of its weights (``rms``). With ``rms`` and α = 0.5 the
            errors of rotated inputs and of weights are least, as they depend on a channel's share in the token's norm
            instead of its range.
        rotation_seed: for ``rotate``: seed of the signs, and of the matrices of widths without a Hadamard matrix.
    """

    transform: Literal["none", "awq", "smooth", "rotate", "smooth+rotate"] = "none"
    alpha_steps: int = Field(20, ge=1)
    min_clip: float = Field(0.5, gt=0, le=1)
    duo_scaling: bool = False
    search_tokens: int = Field(512, ge=1)
    smooth_alpha: float = Field(0.5, ge=0, le=1)
    smooth_by: Literal["max", "rms"] = "max"
    rotation_seed: int = Field(0, ge=0)

    @property
    def transforms(self) -> tuple[str, ...]:
        """The transformations of ``transform``, in order; empty for ``none``."""
        return () if self.transform == "none" else tuple(self.transform.split("+"))

    @property
    def clips(self) -> tuple[float, ...]:
        """The clipping factors, widest first."""
        return grid_from_one(self.min_clip, CLIP_STEP)


class GPTQOptions(_Options):
    """How weights are rounded.

    Attributes:
        rounding: to the ``nearest`` value, or column by column, where later columns compensate the errors of earlier
            ones (``gptq``; Frantar et al., 2023).
        damping: for ``gptq``: share of the mean diagonal of the inputs' second moments that is added to the diagonal.
            More damping stays closer to the nearest values, and fits the calibration data less.
        act_order: for ``gptq``: round columns of large inputs first; groups are those of the original order.
        token_errors: for ``gptq``: the error summed over tokens: ``squared``, or ``relative``: divided by the squared
            norm of the token's input. The first token's squared norm can be a thousand times that of others, whose
            squared errors then have no influence.
        correction: for ``gptq``: the share of the error of the layers below that a weight compensates (after GPTAQ, Li
            et al., 2025). 0: the target is the full-precision weight's output on the quantized model's inputs.
        weight_clip: ``mse`` narrows the range of each group of weights to the least squared error of the weights; with
            ``transform=awq`` instead of AWQ's own clipping, which has the least error of outputs.
    """

    rounding: Literal["nearest", "gptq"] = "nearest"
    damping: float = Field(0.01, gt=0)
    act_order: bool = True
    token_errors: Literal["squared", "relative"] = "squared"
    correction: float = Field(0.0, ge=0, le=1)
    weight_clip: Literal["none", "mse"] = "none"


class RangeOptions(_Options):
    """How activation ranges are found, and how errors are weighted.

    Attributes:
        observer: ``minmax`` takes the extremes observed in calibration; ``lp`` multiplies them by the ratio with the
            least l_p distance (paper, Eq. 2 and section 4.1).
        ranges: for ``lp``: one ratio for each ``site``, or for each ``channel`` of a static site. Where a few massive
            channels dominate a site, a single ratio fits only these.
        norm: for ``lp``: exponent p of the l_p distance.
        min_ratio: for ``lp``: the narrowest candidate range, as a share of the observed one.
        ratio_step: for ``lp``: distance between candidates, from 1 downwards.
        importance: ``jacobian`` weights the errors of ranges, blocks and weights by how much the answers depend on the
            element or token, and gives each static channel its own ratio (`qvlm_plugin.methods.importance`);
            ``modality`` weights errors at image tokens by one factor for each layer, at text tokens by 1 (Li et al.,
            2025, "MBQ"); ``uniform`` is the paper's choice.
        zero_on_grid: shift static ranges of channels, by half a step at most, so that 0 is one of the rounding points.
            Not in the paper.
        bias_correction: correct biases by the mean output error of the rounded weights. Not in the paper.
    """

    observer: Literal["minmax", "lp"] = "minmax"
    ranges: Literal["site", "channel"] = "site"
    norm: float = Field(2.0, gt=0)
    min_ratio: float = Field(0.5, gt=0, le=1)
    ratio_step: float = Field(0.05, gt=0, lt=1)
    importance: Literal["uniform", "jacobian", "modality"] = "uniform"
    zero_on_grid: bool = False
    bias_correction: bool = False

    @property
    def ratios(self) -> tuple[float, ...]:
        """The candidates, widest first."""
        return grid_from_one(self.min_ratio, self.ratio_step)


class MiningOptions(_Options):
    """Cross-layer dependency mining (CDM): the joint search of blocks.

    Attributes:
        cdm: mine cross-layer dependency and search blocks jointly.
        cdm_parts: search the blocks of the ``decoder``, as in the paper, or first those of the vision tower, too.
        dependency: compute dependency from the codes of each layer's first ``site``, within its own bounds, or from
            codes of each layer's ``output`` within its channels' extremes, although the model does not round it.
        min_percentile: lower end of the grid (paper, section 4.1: 0.98).
        max_percentile: upper end of the grid; above 1 it widens ranges (per-token ranges at most to the extremes).
        percentile_step: distance between candidates (paper: 0.005).
        reading: the meaning of a percentile p: ``fraction`` scales a channel's range by p, ``quantile`` takes the
            channel's quantiles 1 - p and p over the calibration tokens. Per-token ranges are scaled by p in both.
        unit: one percentile for each decoder ``layer``, or for each ``site`` of it (needs ``beam``).
        max_depth: maximum number of layers in a block (paper, section 4.1: 3).
        h0: dependency threshold of the partition; None: the mean dependency before ``veo``.
        beam: prefixes kept after each step of a block's search; 0 tries all combinations.
        prune: with ``beam=0``: the share of the batches on which all combinations are evaluated; the best of them, as
            many as there are percentiles, are then evaluated on all batches. 1: all combinations on all batches.
        tokens: tokens over which the error is summed: ``all`` (as printed), ``text`` or ``answer``.
        relative_error: divide each token's error by its squared norm.
    """

    cdm: bool = False
    cdm_parts: Literal["decoder", "vision+decoder"] = "decoder"
    dependency: Literal["site", "output"] = "site"
    min_percentile: float = Field(0.98, gt=0, le=1)
    max_percentile: float = Field(1.0, ge=1, le=2)
    percentile_step: float = Field(0.005, gt=0, lt=1)
    reading: Literal["fraction", "quantile"] = "fraction"
    unit: Literal["layer", "site"] = "layer"
    max_depth: int = Field(3, ge=1)
    h0: float | None = Field(None, ge=0)
    beam: int = Field(0, ge=0)
    prune: float = Field(1.0, gt=0, le=1)
    tokens: Literal["all", "text", "answer"] = "all"
    relative_error: bool = False

    @property
    def mined_parts(self) -> tuple[str, ...]:
        """The parts in ``cdm_parts``, from the bottom up."""
        return tuple(self.cdm_parts.split("+"))

    @property
    def percentiles(self) -> tuple[float, ...]:
        """The grid: 1, then the smaller percentiles, then the larger ones."""
        above = grid_from_one(2 - self.max_percentile, self.percentile_step)[1:]
        return (*grid_from_one(self.min_percentile, self.percentile_step), *(round(2 - p, 6) for p in above))


class VisionOptions(_Options):
    """Visual encoder optimization (VEO): the training of the tower's quantization parameters.

    Attributes:
        veo: optimize the visual encoder.
        eta: η, weight of the final hidden state's error relative to that of the vision features (Eq. 9).
        lambda1, lambda2: weights of the entropy and of the errors (Eq. 10).
        veo_epochs: passes over the calibration set (paper, section 4.1: 10).
        veo_train: ``clip`` trains clip ratios; ``clip+norm`` also the affine terms of the tower's layer norms.
        veo_clip_rate: initial learning rate of the clip ratios (Adam's first step has about this size), with cosine
            decay to 0.
        veo_norm_rate: initial learning rate of the norms, with cosine decay to 0.
        veo_decoder: the language model in training: ``quantized`` (as the paper's errors are those of the quantized
            model), or in ``full`` precision.
        veo_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    veo: bool = False
    eta: float = Field(1.0, ge=0)
    lambda1: float = Field(1.0, ge=0)
    lambda2: float = Field(1.0, ge=0)
    veo_epochs: int = Field(10, ge=0)
    veo_train: Literal["clip", "clip+norm"] = "clip"
    veo_clip_rate: float = Field(5e-3, gt=0)
    veo_norm_rate: float = Field(2e-3, gt=0)
    veo_decoder: Literal["quantized", "full"] = "quantized"
    veo_checkpointing: bool = True


_READ_WITH = {
    (("transform", "awq"),): ("alpha_steps", "duo_scaling", "search_tokens"),
    (("transform", "awq"), ("weight_clip", "mse")): ("min_clip",),
    (("transform", "smooth"), ("transform", "smooth+rotate")): ("smooth_alpha", "smooth_by"),
    (("transform", "rotate"), ("transform", "smooth+rotate")): ("rotation_seed",),
    (("rounding", "gptq"),): ("damping", "act_order", "token_errors", "correction"),
    (("observer", "lp"),): ("ranges", "norm", "min_ratio", "ratio_step"),
}
"""Options that only certain values of other options use. Options of ``cdm`` and ``veo`` are not listed, since ablations
switch these two off and leave the rest as it is."""


class MethodOptions(VisionOptions, MiningOptions, GPTQOptions, RangeOptions, TransformOptions, FormatOptions):
    """All options; the defaults round to nearest within observed extremes.

    Attributes:
        calibration_batch_size: samples per forward pass (paper, section 4.1: 8).
    """

    calibration_batch_size: int = Field(8, ge=1)

    @model_validator(mode="after")
    def _choices_go_together(self) -> "MethodOptions":
        for choices, names in _READ_WITH.items():
            if any(getattr(self, choice) == wanted for choice, wanted in choices):
                continue
            for name in names:
                given = getattr(self, name)
                if given != type(self).model_fields[name].default:
                    readers = " or ".join(f"{choice}={wanted}" for choice, wanted in choices)
                    raise ValueError(f"{name}={given} is used with {readers} only")
        if self.unit == "site" and not self.beam:
            raise ValueError("unit=site has too many combinations to try them all; set beam, for example beam=4")
        if self.reading == "quantile" and self.max_percentile > 1:
            raise ValueError(f"max_percentile={self.max_percentile}: reading=quantile has no percentiles above 1")
        if self.importance == "jacobian" and self.activations == "channel" and self.observer != "lp":
            raise ValueError("importance=jacobian weights the search of channel ranges: use it with observer=lp")
        if "rotate" in self.transforms and self.activations == "channel":
            raise ValueError(
                f"transform={self.transform} spreads a massive channel over all channels, which widens their static "
                "ranges; use it with activations=token"
            )
        return self
