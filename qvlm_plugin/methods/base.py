"""What a quantization method is, and the options that methods share. It takes no torch to describe a method."""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.scheme import PARTS, UNQUANTIZED, Scheme

if TYPE_CHECKING:
    from qvlm_plugin.calibration import CalibrationSet
    from qvlm_plugin.models.loading import LoadedModel
    from qvlm_plugin.plan import RoundingPlan
    from qvlm_plugin.topology import Topology
    from qvlm_plugin.workspace import Workspace

WeightKind = Literal["int", "nf"]
"""Number formats of quantized weights: uniform integers, or a normal-float codebook."""


class MethodOptions(BaseModel):
    """Options every quantizing method has.

    Attributes:
        weights: number format of the weights, ``int`` or ``nf``.
        group_size: for ``int`` weights: input channels that share a scale; -1 shares it along an output channel.
        symmetric: for ``int`` weights: no fitted zero point.
        double_quantization: for ``nf`` weights: quantize the block scales too.
        calibration_batch_size: samples per forward pass (paper, section 4.1: 8).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: WeightKind = "int"
    group_size: int = Field(128, ge=-1)
    symmetric: bool = False
    double_quantization: bool = True
    calibration_batch_size: int = Field(8, ge=1)

    def weight_format(self, bits: int) -> WeightFormat:
        """The format of a weight of ``bits`` bits."""
        if bits == UNQUANTIZED:
            return WeightFormat()
        if self.weights == "nf":
            return WeightFormat(kind="nf", bits=bits, double_quantization=self.double_quantization)
        group_size = self.group_size if self.group_size > 0 else None
        return WeightFormat(kind="int", bits=bits, group_size=group_size, symmetric=self.symmetric)


def grid_from_one(minimum: float, step: float) -> tuple[float, ...]:
    """Candidates from 1 down to ``minimum`` at most, ``step`` apart."""
    count = int((1 - minimum) / step + 1e-9) + 1
    return tuple(round(1 - index * step, 6) for index in range(count))


@dataclass(frozen=True)
class Method:
    """A way to quantize.

    Attributes:
        name: as ``method=`` names it.
        summary: one line for help texts.
        options: pydantic model of its options; unknown ones are errors.
        needs_calibration: whether the scheme and the options make it look at calibration data.
        fit: (model, topology, scheme, calibration or None, options, workspace) → plan. It must leave the model
            unchanged. A long search keeps its steps in the workspace, so that an interrupted one resumes there.
    """

    name: str
    summary: str
    options: type[BaseModel]
    needs_calibration: Callable[[Scheme, BaseModel], bool]
    fit: "Callable[[LoadedModel, Topology, Scheme, CalibrationSet | None, BaseModel, Workspace], RoundingPlan]"


def imported(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names, imported when it is called; for the `Method.fit` of methods that are
    to be listed without importing what they compute with.
    """

    def call(*arguments: Any) -> Any:
        return resolve_name(name)(*arguments)

    call.__module__ = name.partition(":")[0]  # where the code is that decides a cached plan
    return call


def quantizes_activations(scheme: Scheme, options: BaseModel) -> bool:
    """Whether any part's activations are rounded, whatever the options."""
    return any(getattr(scheme, part).activation != UNQUANTIZED for part in PARTS)


def quantizes_anything(scheme: Scheme, options: BaseModel) -> bool:
    """Whether any part's weights or activations are rounded, whatever the options."""
    return any(not getattr(scheme, part).is_identity for part in PARTS)
