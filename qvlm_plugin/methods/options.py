"""What the methods take as options; Q-VLM's are in `qvlm_plugin.methods.qvlm.options`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qvlm_plugin.methods.base import (
    MethodOptions,
    WeightKind,
    grid_from_one,
    quantizes_activations,
    quantizes_anything,
)
from qvlm_plugin.scheme import Scheme

CLIP_STEP = 0.05
"""Distance between clipping factors, from 1 downwards."""


class NoOptions(BaseModel):
    """There is nothing to choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RangeSearchOptions(MethodOptions):
    """Options of the layer-wise search of activation ranges.

    Attributes:
        ranges: what has a ratio of its own: a ``site``, or each ``channel`` of a static site. Within a site that a few
            massive channels dominate, one ratio serves these alone.
        norm: exponent p of the l_p distance.
        min_ratio: the narrowest candidate range, as a share of the observed one.
        ratio_step: distance between candidates, from 1 downwards.
        bias_correction: biases make up for what rounding the weights adds to the mean outputs. Not the paper's.
    """

    ranges: Literal["site", "channel"] = "site"
    norm: float = Field(2.0, gt=0)
    min_ratio: float = Field(0.5, gt=0, le=1)
    ratio_step: float = Field(0.05, gt=0, lt=1)
    bias_correction: bool = False

    @property
    def ratios(self) -> tuple[float, ...]:
        """The candidates, widest first."""
        return grid_from_one(self.min_ratio, self.ratio_step)


class QLoRAOptions(RangeSearchOptions):
    """Options of ``qlora``: the weights are normal-float unless told otherwise."""

    weights: WeightKind = "nf"


def looks_at_data(scheme: Scheme, options: RangeSearchOptions) -> bool:
    """Whether ranges are searched or means observed."""
    return quantizes_activations(scheme, options) or (options.bias_correction and quantizes_anything(scheme, options))


class AWQOptions(RangeSearchOptions):
    """Options of ``awq``; the weights are ``int`` unless told otherwise.

    Attributes:
        alpha_steps: exponents tried for a site's scale, evenly from 0 up to but without 1; 1 switches scaling off.
        min_clip: the narrowest weight range tried, as a share of the whole one; 1 switches clipping off.
        search_tokens: calibration tokens of each site that errors are measured on.
    """

    alpha_steps: int = Field(20, ge=1)
    min_clip: float = Field(0.5, gt=0, le=1)
    search_tokens: int = Field(512, ge=1)

    @property
    def clips(self) -> tuple[float, ...]:
        """The clipping factors, widest first."""
        return grid_from_one(self.min_clip, CLIP_STEP)
