"""What ``qvlm`` and ``qvlm_jacobian`` take as options."""

from typing import Literal

from pydantic import Field, model_validator

from qvlm_plugin.methods.base import MethodOptions, WeightKind, grid_from_one
from qvlm_plugin.methods.options import RangeSearchOptions


class MiningOptions(RangeSearchOptions):
    """Options of the joint search.

    Attributes:
        min_percentile: the grid's end (paper, section 4.1: 0.98); it begins at 1.
        percentile_step: distance between candidates (paper: 0.005).
        reading: what a percentile p bounds: ``fraction`` scales a channel's range by p, ``quantile`` takes the
            channel's quantiles 1 - p and p over the calibration tokens.
        unit: what has a percentile of its own: each decoder ``layer``, or each ``site`` of it (needs ``beam``).
        max_depth: layers in a block (paper, section 4.1: 3).
        h0: dependency threshold of the partition; None takes the mean.
        beam: prefixes kept after each step of a block's search; 0 tries all combinations.
        tokens: which tokens the error counts: ``all`` (as printed), ``text`` or ``answer``.
        relative_error: divide each token's error by its squared norm.
        importance: ``jacobian`` weighs errors by how much the answers depend on the element or token, and gives each
            channel a ratio of its own (see `qvlm_plugin.methods.qvlm.importance`); ``uniform`` is the paper's.
    """

    min_percentile: float = Field(0.98, gt=0, le=1)
    percentile_step: float = Field(0.005, gt=0, lt=1)
    reading: Literal["fraction", "quantile"] = "fraction"
    unit: Literal["layer", "site"] = "layer"
    max_depth: int = Field(3, ge=1)
    h0: float | None = Field(None, ge=0)
    beam: int = Field(0, ge=0)
    tokens: Literal["all", "text", "answer"] = "all"
    relative_error: bool = False
    importance: Literal["uniform", "jacobian"] = "uniform"

    @model_validator(mode="after")
    def _can_be_searched(self) -> "MiningOptions":
        if self.unit == "site" and not self.beam:
            raise ValueError("unit=site has too many combinations to try them all; set beam, for example beam=4")
        return self

    @property
    def percentiles(self) -> tuple[float, ...]:
        """The grid, from 1 down."""
        return grid_from_one(self.min_percentile, self.percentile_step)


class VisionOptions(MethodOptions):
    """Options of the visual encoder optimization.

    Attributes:
        eta: η, weight of the final hidden state's error against that of the vision features (Eq. 9).
        lambda1, lambda2: weights of the entropy and of the errors (Eq. 10).
        veo_epochs: passes over the calibration set (paper, section 4.1: 10).
        veo_train: ``clip`` trains clip ratios, ``clip+norm`` the affine terms of the tower's layer norms too.
        veo_clip_rate: learning rate of the clip ratios: about how far the first step moves them; it falls to 0 along a
            half cosine.
        veo_norm_rate: learning rate of the norms, likewise.
        veo_decoder: the language model that the tower is trained under: ``quantized`` as it will be (the paper's errors
            are those of the quantized model), or ``full`` precision, which needs no rounded copy of its weights.
        veo_checkpointing: run each block again in the backward pass instead of keeping its activations.
    """

    eta: float = Field(1.0, ge=0)
    lambda1: float = Field(1.0, ge=0)
    lambda2: float = Field(1.0, ge=0)
    veo_epochs: int = Field(10, ge=0)
    veo_train: Literal["clip", "clip+norm"] = "clip"
    veo_clip_rate: float = Field(5e-3, gt=0)
    veo_norm_rate: float = Field(2e-3, gt=0)
    veo_decoder: Literal["quantized", "full"] = "quantized"
    veo_checkpointing: bool = True


class QVLMOptions(MiningOptions, VisionOptions):
    """Options of ``qvlm``: those of both parts, and switches for them.

    Attributes:
        weights: normal-float unless told otherwise, as in the baseline that the paper builds on.
        cdm: mine cross-layer dependency and search blocks jointly.
        veo: optimize the visual encoder.
    """

    weights: WeightKind = "nf"
    cdm: bool = True
    veo: bool = True


class JacobianOptions(QVLMOptions):
    """Options of ``qvlm_jacobian``: those of ``qvlm``; see there for their meaning."""

    cdm: bool = False
    importance: Literal["uniform", "jacobian"] = "jacobian"
    bias_correction: bool = True
    min_ratio: float = Field(0.3, gt=0, le=1)
    ratio_step: float = Field(0.1, gt=0, lt=1)
    beam: int = Field(2, ge=0)
    veo_train: Literal["clip", "clip+norm"] = "clip+norm"
    veo_epochs: int = Field(3, ge=0)
