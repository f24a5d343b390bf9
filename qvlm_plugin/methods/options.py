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
        group_size: for ``int`` weights: number of input channels that share one scale. -1: one scale for each output
            channel.
        symmetric: for ``int`` weights: use the middle code as the zero point, instead of fitting one to each group.
        group_scales: for ``int`` weights of up to 4 bits in groups: ``free`` gives each group any scale;
            ``progressive`` rounds it to a whole multiple of a unit of its output channel, so that one integer product
            serves all groups.
        double_quantization: for ``nf`` weights: quantize the scales of the blocks too, which saves memory.
        activations: how the decoder's activations are rounded: per ``channel``, within bounds that calibration fixes
            (paper, section 4.3), or per ``token``, within the token's own extremes. The visual part is always rounded
            per token.
        center: subtract each channel's calibration mean before a token is rounded. Not in the paper.
        token_bounds: where ranges per token end: at the token's ``extremes``, or where a ``normal`` distribution would
            be rounded with the least squared error, and at most at the extremes (2.1 standard deviations from the
            token's mean at 3 bits, 2.5 at 4, 3.9 at 8). Use ``normal`` with rotation. Not in the paper.
    """

    weights: Literal["int", "nf"] = "int"
    group_size: int = Field(128, ge=-1)
    symmetric: bool = False
    group_scales: Literal["free", "progressive"] = "free"
    double_quantization: bool = True
    activations: Literal["channel", "token"] = "channel"
    center: bool = False
    token_bounds: Literal["extremes", "normal"] = "extremes"

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
        if static:
            return ActivationFormat(kind="static_channel", bits=bits)
        return ActivationFormat(kind="dynamic_token", bits=bits, normal=self.token_bounds == "normal")


class TransformOptions(_Options):
    """Transformations of the inputs of Linears that leave the full-precision model unchanged.

    Attributes:
        transform: ``awq`` scales channels to reduce weight errors, and clips the weights (Lin et al., 2023). ``smooth``
            moves magnitude from activation channels into the weights ("SmoothQuant", Xiao et al., 2023). ``rotate``
            multiplies inputs by an orthogonal matrix, which spreads massive channels over all channels ("QuaRot",
            Ashkboos et al., 2024). ``smooth+rotate`` smooths, then rotates.
        alpha_steps: for ``awq``: number of scales to try for a site, with exponents α evenly spaced from 0 to below 1
            (with ``duo_scaling`` no scaling, then α from 0 to 1). 1 switches scaling off.
        min_clip: for ``awq`` and ``weight_clip``: the narrowest weight range to try, as a share of the whole range. 1
            switches clipping off.
        duo_scaling: for ``awq``: compute a site's scale from inputs and weights, mean|x|^α / mean|w|^(1-α), as AutoAWQ
            does. False: from inputs only, mean|x|^α, as in the paper.
        search_tokens: for ``awq``: number of calibration tokens of each site on which errors are measured. More tokens
            are slower.
        smooth_alpha: for ``smooth``: exponent α, the share of a channel's magnitude that moves into the weights
            (SmoothQuant, Eq. 4).
        smooth_by: for ``smooth``: how a channel's magnitude is measured: by its maximum (``max``, as SmoothQuant does)
            or by its root mean square without massive tokens (``rms``). Use ``rms`` with rotation: with α = 0.5 it
            minimizes the errors of rotated inputs and weights.
        rotation_seed: for ``rotate``: seed of the random signs, and of the random matrix if no Hadamard matrix has the
            width.
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
        rounding: how weights are rounded: each to the ``nearest`` value, or by ``gptq``, column by column, where later
            columns compensate the errors of earlier ones (Frantar et al., 2023).
        damping: for ``gptq``: value to add to the diagonal of the inputs' second moments, as a share of the diagonal's
            mean. A larger value keeps weights closer to their nearest values and fits the calibration data less.
        act_order: for ``gptq``: round the columns with the largest inputs first. Groups stay those of the original
            order.
        token_errors: for ``gptq``: sum ``squared`` errors over tokens, or ``relative`` ones, divided by the squared
            norm of the token's input. With ``squared`` the first token can outweigh all others, since its squared norm
            can be a thousand times theirs.
        correction: for ``gptq``: share of the lower layers' error that the weights compensate (after GPTAQ, Li et al.,
            2025), except in experts. 0: none; the weights then approximate the full-precision weights on the quantized
            model's inputs. Cannot be combined with ``bias_correction``.
        weight_clip: ``mse`` narrows each group's weight range to minimize the squared error of the weights. With
            ``transform=awq`` it replaces AWQ's own clipping, which minimizes the error of the outputs.
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
        observer: how activation ranges are found: ``minmax`` takes the extremes observed in calibration; ``lp``
            multiplies them by the ratio with the least l_p error (paper, Eq. 2 and section 4.1).
        ranges: for ``lp``: search one ratio for each ``site``, or one for each ``channel`` of a site with static
            ranges. Use ``channel`` where a few massive channels dominate a site.
        norm: for ``lp``: exponent p of the l_p error.
        min_ratio: for ``lp``: the narrowest range to try, as a share of the observed range.
        ratio_step: for ``lp``: distance between the ratios to try, which start at 1 and decrease.
        importance: how errors are weighted: ``uniform`` weights all alike, as in the paper. ``jacobian`` weights them
            by their effect on the answers, and gives each static channel its own ratio; ``modality`` gives image tokens
            one weight in each layer and text tokens 1 ("MBQ", Li et al., 2025). Read by GPTQ and ``cdm``, by AWQ
            (``jacobian``: unless activations are rounded per channel), and with ``jacobian`` by ``observer=lp``.
        zero_on_grid: for activations rounded per ``channel``: shift each range, by at most half a step, so that 0 is
            represented exactly. Not in the paper.
        bias_correction: adjust biases so that rounding the weights does not shift a Linear's mean output for
            full-precision inputs, massive tokens left out. Not in the paper.
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
        cdm: cross-layer dependency mining: group dependent layers into blocks and search the activation ranges of each
            block's layers jointly.
        cdm_parts: for ``cdm``: search the blocks of the ``decoder`` only, as in the paper, or those of the vision tower
            first and then the decoder's (``vision+decoder``).
        dependency: for ``cdm`` and ``veo``: compute the dependency of two layers from the codes of their inputs
            (``site``: the input of a layer's first site, within its bounds), or of their outputs (``output``: within
            each channel's extremes; the model does not round these).
        assignment: for ``cdm`` and ``veo``: the distance to a rounding point in Eq. 5. ``steps`` measures it in steps;
            ``literal`` divides the squared distance in x by the step, as printed, which depends on the scale of x.
        min_percentile: for ``cdm``: the smallest percentile to try, as a share (paper, section 4.1: 0.98).
        max_percentile: for ``cdm``: the largest percentile to try, as a share. Values above 1 widen ranges (per-token
            ranges at most to the token's extremes).
        percentile_step: for ``cdm``: distance between the percentiles to try (paper: 0.005).
        reading: for ``cdm``: what a percentile p means: ``fraction`` multiplies a channel's range by p; ``quantile``
            takes the channel's quantiles 1 - p and p over the calibration tokens. Per-token ranges are always
            multiplied by p.
        unit: for ``cdm``: choose one percentile for each ``layer``, or one for each ``site`` of a layer (needs
            ``beam``).
        max_depth: for ``cdm``: maximum number of layers in a block (paper, section 4.1: 3). 1 searches each layer by
            itself.
        h0: for ``cdm``: threshold h0 on the mean dependency within a block; a higher one makes smaller blocks (Eq. 7).
            Default: the mean dependency of all neighboring layers, measured before ``veo``.
        beam: for ``cdm``: number of partial combinations kept after each step of a block's search, which makes it
            faster. 0 tries all combinations.
        prune: for ``cdm`` with ``beam=0``: share of the calibration batches on which all combinations are tried. The
            best of them, as many as there are percentiles, are then tried on all batches; 1 tries all combinations on
            all batches.
        tokens: for ``cdm``: tokens whose errors are summed: ``all`` (as printed in the paper), ``text`` or ``answer``.
        relative_error: for ``cdm``: divide each token's error by the token's squared norm, so that massive tokens do
            not dominate.
    """

    cdm: bool = False
    cdm_parts: Literal["decoder", "vision+decoder"] = "decoder"
    dependency: Literal["site", "output"] = "site"
    assignment: Literal["steps", "literal"] = "steps"
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
        veo: visual encoder optimization: train the vision tower's quantization parameters before the decoder is
            searched.
        eta: for ``veo``: η, weight of the error of the final hidden state, relative to that of the vision features (Eq.
            9).
        lambda1: for ``veo``: λ1, weight of the entropy term in the loss (Eq. 10). 0 leaves the term out.
        lambda2: for ``veo``: λ2, weight of the error term in the loss (Eq. 10). 0 leaves the term out.
        veo_epochs: for ``veo``: number of passes over the calibration set (paper, section 4.1: 10).
        veo_train: for ``veo``: train the ``clip`` ratios of activation ranges, or also the weights and biases of the
            tower's layer norms (``clip+norm``).
        veo_clip_rate: for ``veo``: initial learning rate of the clip ratios, which decays to 0 along a cosine. Adam's
            first step is about this large.
        veo_norm_rate: for ``veo``: initial learning rate of the layer norms, which decays to 0 along a cosine.
        veo_decoder: for ``veo``: train with the ``quantized`` decoder, whose errors the paper uses, or with the decoder
            in ``full`` precision.
        veo_checkpointing: for ``veo``: save memory by computing each block again in the backward pass. False is faster
            and needs more memory.
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
    (("beam", 0),): ("prune",),
}
"""Options that only certain values of other options use. That options need ``cdm`` or ``veo`` is not listed, since
ablations switch these two off and leave the rest as it is."""


class MethodOptions(VisionOptions, MiningOptions, GPTQOptions, RangeOptions, TransformOptions, FormatOptions):
    """All options; the defaults round to nearest within observed extremes.

    Attributes:
        calibration_batch_size: calibration samples per forward pass (paper, section 4.1: 8). Lower it if a search runs
            out of memory.
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
        if self.correction and self.bias_correction:
            raise ValueError(
                f"correction={self.correction} shifts the outputs of Linears, which corrected biases would undo; add "
                "bias_correction=false"
            )
        if self.unit == "site" and not self.beam:
            raise ValueError("unit=site has too many combinations to try them all; set beam, for example beam=4")
        if self.reading == "quantile" and self.max_percentile > 1:
            raise ValueError(f"max_percentile={self.max_percentile}: reading=quantile has no percentiles above 1")
        if self.cdm and self.max_percentile > 1 and not self._can_widen:
            raise ValueError(
                f"max_percentile={self.max_percentile}: ranges per token end at the token's extremes already; use "
                "max_percentile=1, token_bounds=normal or observer=lp"
            )
        if self.importance == "jacobian" and self.activations == "channel" and self.observer != "lp":
            raise ValueError("importance=jacobian weights the search of channel ranges: use it with observer=lp")
        weighs_ranges = self.importance == "jacobian" and self.activations == "channel"
        weighs_others = self.transform == "awq" or self.rounding == "gptq" or self.cdm
        if self.importance != "uniform" and not (weighs_ranges or weighs_others):
            raise ValueError(
                f"importance={self.importance} has no errors to weight; use it with transform=awq, rounding=gptq or "
                "cdm=true"
            )
        if "rotate" in self.transforms and self.activations == "channel":
            raise ValueError(
                f"transform={self.transform} spreads a massive channel over all channels, which widens their static "
                "ranges; use it with activations=token"
            )
        return self

    @property
    def _can_widen(self) -> bool:
        """Whether the decoder has ranges that a percentile above 1 widens."""
        return self.activations == "channel" or self.token_bounds == "normal" or self.observer == "lp"
