"""``none``: full precision, as a plan that changes nothing - so that the baseline is reported like any method."""

from dataclasses import replace

from pydantic import BaseModel, ConfigDict

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.methods.base import Method, MethodOptions, build_plan
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.scheme import Scheme
from qvlm_plugin.topology import Topology
from qvlm_plugin.workspace import Workspace

IDENTITY = Scheme.parse("w16a16")


class NoOptions(BaseModel):
    """There is nothing to choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def fit(
    loaded: LoadedModel,
    topology: Topology,
    scheme: Scheme,
    calibration: CalibrationSet | None,
    options: NoOptions,
    workspace: Workspace,
) -> RoundingPlan:
    """A plan that lists every Linear as unquantized, whatever the scheme."""
    plan = build_plan(NONE.name, loaded, topology, IDENTITY, MethodOptions(), {}, None)
    return replace(plan, options=options.model_dump())


NONE = Method(
    name="none",
    summary="full precision",
    options=NoOptions,
    needs_calibration=lambda scheme, options: False,
    fit=fit,
)
