"""``qvlm``: Q-VLM (Wang et al., NeurIPS 2024).

Visual encoder optimization (VEO) first, then dependency mining, partition and joint search (CDM) on the optimized
tower. ``cdm=false`` and ``veo=false`` leave either out, and with both it is the layer-wise baseline: the rows of the
paper's Table 1.
"""

from typing import Any

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.methods.base import Method, WeightKind, activation_sites, build_plan, quantizes_activations
from qvlm_plugin.methods.blocks import decoder_inputs, replaced
from qvlm_plugin.methods.qlora import search_ranges
from qvlm_plugin.methods.qvlm.mining import Mined, MiningOptions, mine
from qvlm_plugin.methods.qvlm.vision import VisionOptions, optimize_vision
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.plan import RoundingPlan, quantized_linear
from qvlm_plugin.scheme import UNQUANTIZED, Scheme
from qvlm_plugin.topology import Topology, decoder_layers, resolve
from qvlm_plugin.workspace import Workspace


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


def fit(
    loaded: LoadedModel,
    topology: Topology,
    scheme: Scheme,
    calibration: CalibrationSet | None,
    options: QVLMOptions,
    workspace: Workspace,
) -> RoundingPlan:
    """Layer-wise ranges to begin with (section 4.1), the tower's training, then the decoder's joint search."""
    formats = activation_sites(topology, loaded, scheme)
    tensors = search_ranges(loaded, formats, calibration, options) if formats else {}
    record: dict[str, Any] = {}
    changed: tuple[str, ...] = ()
    if options.veo and scheme.vision.activation != UNQUANTIZED:
        if (kept := workspace.recall("vision")) is None:
            vision = optimize_vision(loaded, topology, scheme, calibration, options, tensors)
            data = {"replaced": vision.replaced, "veo": {"curve": vision.curve, "kept_epoch": vision.kept}}
            kept = data, vision.tensors
            workspace.keep("vision", *kept)
        data, trained = kept
        tensors, changed, record["veo"] = tensors | trained, tuple(data["replaced"]), data["veo"]
    plan = build_plan(QVLM.name, loaded, topology, scheme, options, tensors, calibration, replaced=changed)
    if options.cdm and scheme.decoder.activation != UNQUANTIZED:
        mined = _mine(loaded, topology, scheme, calibration, options, plan, workspace)
        tensors, record["cdm"] = tensors | mined.tensors, mined.record
    return build_plan(
        QVLM.name, loaded, topology, scheme, options, tensors, calibration, replaced=changed, record=record
    )


def _mine(
    loaded: LoadedModel,
    topology: Topology,
    scheme: Scheme,
    calibration: CalibrationSet,
    options: QVLMOptions,
    plan: RoundingPlan,
    workspace: Workspace,
) -> Mined:
    """Search the decoder's percentiles, starting from ``plan``, whose vision tower and projector are final."""
    model, batch_size = loaded.model, options.calibration_batch_size
    reference, batches = decoder_inputs(loaded, topology, calibration, batch_size)
    below = {
        module.name: quantized_linear(module, model.get_submodule(module.name), plan.tensors, REFERENCE)
        for module in plan.modules
        if module.part in ("vision", "projector") and not module.is_identity
    }
    with replaced(model, below, {name: plan.tensors[f"{name}/value"] for name in plan.replaced}):
        quantized, _ = decoder_inputs(loaded, topology, calibration, batch_size)
    return mine(
        decoder_layers(topology, model),
        [site for site in resolve(topology, model) if site.part == "decoder"],
        {module.name: module for module in plan.modules},
        plan.tensors,
        reference,
        quantized,
        batches,
        scheme.decoder.activation,
        options,
        workspace,
    )


QVLM = Method(
    name="qvlm",
    summary="Q-VLM: joint search of dependent layers and visual encoder optimization",
    options=QVLMOptions,
    needs_calibration=quantizes_activations,
    fit=fit,
)
