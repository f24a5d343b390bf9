"""``none``: full precision, as a plan that changes nothing - so that the baseline is reported like any method."""

from dataclasses import replace

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.methods.base import MethodOptions
from qvlm_plugin.methods.build import build_plan
from qvlm_plugin.methods.options import NoOptions
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.scheme import Scheme
from qvlm_plugin.topology import Topology
from qvlm_plugin.workspace import Workspace

IDENTITY = Scheme.parse("w16a16")


def fit(
    loaded: LoadedModel,
    topology: Topology,
    scheme: Scheme,
    calibration: CalibrationSet | None,
    options: NoOptions,
    workspace: Workspace,
) -> RoundingPlan:
    """A plan that lists every Linear as unquantized, whatever the scheme."""
    plan = build_plan("none", loaded, topology, IDENTITY, MethodOptions(), {}, None)
    return replace(plan, options=options.model_dump())
