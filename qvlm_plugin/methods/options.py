"""What there is to choose: one group of options for each choice, and `MethodOptions`, which has them all.

A method is a preset: these options with defaults of its own (`qvlm_plugin.builtin`). Any of them may be given to any
method, so that two rows of a comparison can differ in a single choice.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qvlm_plugin.formats import PROGRESSIVE_BITS, ActivationFormat, WeightFormat
from qvlm_plugin.scheme import UNQUANTIZED

CLIP_STEP = 0.05
"""Distance between clipping factors, from 1 downwards."""


def grid_from_one(minimum: float, step: float) -> tuple[float, ...]:
    """Candidates from 1 down to ``minimum`` at most, ``step`` apart."""
    count = int((1 - minimum) / step + 1e-9) + 1
    return tuple(round(1 - index * step, 6) for index in range(count))


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NoOptions(_Options):
    """There is nothing to choose: the model stays in full precision."""

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
        group_size: for ``int`` weights: input channels that share a scale; -1 shares it along an output channel.
        symmetric: for ``int`` weights: no fitted zero point.
        group_scales: for ``int`` weights of up to 4 bits: scales of groups are ``free``, or ``progressive``: whole
            multiples of their output channel's unit, so that one integer product serves all groups.
        double_quantization: for ``nf`` weights: quantize the block scales too.
        activations: how the language model's activations are rounded: each ``channel`` within bounds fixed in
            calibration (paper, section 4.3), or each ``token`` within its own extremes, as in the visual part.
        center: round what is left of a token when the mean of each channel is taken away. Not the paper's.
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

        Where activations vary most decides their quantizer (paper, section 4.3): across channels in the language model,
        across tokens in the visual part, to which the projector's inputs belong.
        """
        if bits == UNQUANTIZED:
            return ActivationFormat()
        static = part == "decoder" and self.activations == "channel"
        return ActivationFormat(kind="static_channel" if static else "dynamic_token", bits=bits)


class TransformOptions(_Options):
    """What transforms the inputs of Linears, without changing the model in full precision.

    Attributes:
        transform: ``awq`` scales channels for the sake of the weights and clips these (Lin et al., 2023); ``smooth``
            moves the magnitude of channels into the weights (Xiao et al., 2023, "SmoothQuant"); ``rotate`` multiplies
            them by an orthogonal matrix, which spreads massive channels over all (Ashkboos et al., 2024, "QuaRot");
            ``smooth+rotate`` does one after the other.
        alpha_steps: for ``awq``: exponents tried for a site's scale, evenly from 0 up to but without 1; 1 switches
            scaling off.
        min_clip: for ``awq`` and ``weight_clip``: the narrowest weight range tried, as a share of the whole one; 1
            switches clipping off.
        search_tokens: for ``awq``: calibration tokens of each site that errors are measured on.
        smooth_alpha: for ``smooth``: the share of a channel's magnitude that moves, in powers (SmoothQuant, Eq. 4).
        smooth_by: for ``smooth``: a channel's magnitude is its largest (``max``, SmoothQuant), or the root mean square
            of its ordinary tokens and of its weights (``rms``). With this and α = 0.5 the errors of rotated inputs, and
            of weights, are least: what matters then is not a channel's range but its share in a token's norm.
        rotation_seed: for ``rotate``: that signs are drawn from, and matrices of widths without a Hadamard matrix.
    """

    transform: Literal["none", "awq", "smooth", "rotate", "smooth+rotate"] = "none"
    alpha_steps: int = Field(20, ge=1)
    min_clip: float = Field(0.5, gt=0, le=1)
    search_tokens: int = Field(512, ge=1)
    smooth_alpha: float = Field(0.5, ge=0, le=1)
    smooth_by: Literal["max", "rms"] = "max"
    rotation_seed: int = Field(0, ge=0)

    @property
    def transforms(self) -> tuple[str, ...]:
        """What ``transform`` names, in order; nothing for ``none``."""
        return () if self.transform == "none" else tuple(self.transform.split("+"))

    @property
    def clips(self) -> tuple[float, ...]:
        """The clipping factors, widest first."""
        return grid_from_one(self.min_clip, CLIP_STEP)


class GPTQOptions(_Options):
    """How weights are rounded.

    Attributes:
        rounding: to the ``nearest`` value, or column by column, so that later ones make up for the errors of earlier
            ones (``gptq``; Frantar et al., 2023).
        damping: for ``gptq``: share of the inputs' mean second moment that is added to all of them. More of it keeps
            closer to the nearest values, and so less to the calibration data.
        act_order: for ``gptq``: columns of large inputs first; scales are those of the columns' own order.
        token_errors: for ``gptq``: what is summed over tokens: the ``squared`` error of each, or the ``relative`` one,
            divided by the squared norm of what the weight multiplies. The first token's can be a thousand times that of
            others, whose errors then count for nothing.
        correction: for ``gptq``: share of what the layers below have lost that a weight makes up for (after GPTAQ, Li
            et al., 2025). 0 fits its output on the quantized model's inputs to what full precision makes of these.
        weight_clip: ``mse`` narrows the range of each group of weights for the least squared error.
    """

    rounding: Literal["nearest", "gptq"] = "nearest"
    damping: float = Field(0.01, gt=0)
    act_order: bool = True
    token_errors: Literal["squared", "relative"] = "squared"
    correction: float = Field(0.0, ge=0, le=1)
    weight_clip: Literal["none", "mse"] = "none"


class RangeOptions(_Options):
    """Where activation ranges come from.

    Attributes:
        observer: ``minmax`` takes the extremes seen in calibration, ``lp`` searches the ratio of these that rounds with
            the least l_p distance (paper, Eq. 2 and section 4.1).
        ranges: for ``lp``: what has a ratio of its own: a ``site``, or each ``channel`` of a static site. Within a site
            that a few massive channels dominate, one ratio serves these alone.
        norm: for ``lp``: exponent p of the l_p distance.
        min_ratio: for ``lp``: the narrowest candidate range, as a share of the observed one.
        ratio_step: for ``lp``: distance between candidates, from 1 downwards.
        importance: ``jacobian`` weighs errors, of ranges, blocks and weights, by how much the answers depend on the
            element or token, and gives each static channel a ratio of its own (`qvlm_plugin.methods.importance`);
            ``modality`` weighs those at image tokens by one ratio for each layer, those at text by 1 (Li et al., 2025,
            "MBQ"); ``uniform`` is the paper's.
        zero_on_grid: move static ranges of channels, by half a step at most, so that 0 is one of the points. Not the
            paper's.
        bias_correction: biases make up for what rounding the weights adds to the mean outputs. Not the paper's.
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
        cdm_parts: whose blocks: the ``decoder``'s, as in the paper, or before them those of the vision tower, too.
        dependency: whose codes dependency is of: those of each layer's first ``site``, within its own bounds, or of
            each layer's ``output`` within its channels' extremes, which nothing rounds.
        min_percentile: the grid's lower end (paper, section 4.1: 0.98).
        max_percentile: its upper end; more than 1 widens ranges (those of tokens up to their extremes).
        percentile_step: distance between candidates (paper: 0.005).
        reading: what a percentile p bounds: ``fraction`` scales a channel's range by p, ``quantile`` takes the
            channel's quantiles 1 - p and p over the calibration tokens. A token's range is scaled in either.
        unit: what has a percentile of its own: each decoder ``layer``, or each ``site`` of it (needs ``beam``).
        max_depth: layers in a block (paper, section 4.1: 3).
        h0: dependency threshold of the partition; None takes the mean dependency before ``veo``.
        beam: prefixes kept after each step of a block's search; 0 tries all combinations.
        prune: with ``beam=0``: the share of the batches that all combinations are judged on; only the best of them, as
            many as there are percentiles, are judged on all. 1 judges all on all.
        tokens: which tokens the error counts: ``all`` (as printed), ``text`` or ``answer``.
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
        """What ``cdm_parts`` names, from below."""
        return tuple(self.cdm_parts.split("+"))

    @property
    def percentiles(self) -> tuple[float, ...]:
        """The grid: 1, then those below it, then those above."""
        above = grid_from_one(2 - self.max_percentile, self.percentile_step)[1:]
        return (*grid_from_one(self.min_percentile, self.percentile_step), *(round(2 - p, 6) for p in above))


class VisionOptions(_Options):
    """Visual encoder optimization (VEO): the training of the tower's quantization parameters.

    Attributes:
        veo: optimize the visual encoder.
        eta: η, weight of the final hidden state's error against that of the vision features (Eq. 9).
        lambda1, lambda2: weights of the entropy and of the errors (Eq. 10).
        veo_epochs: passes over the calibration set (paper, section 4.1: 10).
        veo_train: ``clip`` trains clip ratios, ``clip+norm`` the affine terms of the tower's layer norms too.
        veo_clip_rate: learning rate of the clip ratios: about how far the first step moves them; it falls to 0 along a
            half cosine.
        veo_norm_rate: learning rate of the norms, likewise.
        veo_decoder: the language model that the tower is trained under: ``quantized`` as it will be (the paper's errors
            are those of the quantized model), or ``full`` precision.
        veo_checkpointing: run each block again in the backward pass instead of keeping its activations.
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
    (("transform", "awq"),): ("alpha_steps", "search_tokens"),
    (("transform", "awq"), ("weight_clip", "mse")): ("min_clip",),
    (("transform", "smooth"), ("transform", "smooth+rotate")): ("smooth_alpha", "smooth_by"),
    (("transform", "rotate"), ("transform", "smooth+rotate")): ("rotation_seed",),
    (("rounding", "gptq"),): ("damping", "act_order", "token_errors", "correction"),
    (("observer", "lp"),): ("ranges", "norm", "min_ratio", "ratio_step"),
}
"""Options that only some values of choices read. Those of ``cdm`` and ``veo`` may stay when these are switched off, as
ablations do."""


class MethodOptions(VisionOptions, MiningOptions, GPTQOptions, RangeOptions, TransformOptions, FormatOptions):
    """All choices; the defaults round to nearest within observed extremes.

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
                    raise ValueError(f"{name}={given} is read with {readers} only")
        if self.unit == "site" and not self.beam:
            raise ValueError("unit=site has too many combinations to try them all; set beam, for example beam=4")
        if self.reading == "quantile" and self.max_percentile > 1:
            raise ValueError(f"max_percentile={self.max_percentile}: reading=quantile has no percentiles above 1")
        if self.importance == "jacobian" and self.activations == "channel" and self.observer != "lp":
            raise ValueError("importance=jacobian weighs the search of channels' ranges: use it with observer=lp")
        if "rotate" in self.transforms and self.activations == "channel":
            raise ValueError(
                f"transform={self.transform} spreads a massive channel over all, which widens static ranges of "
                "channels; use it with activations=token"
            )
        return self
