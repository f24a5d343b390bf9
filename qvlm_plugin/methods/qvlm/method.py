"""``qvlm``: Q-VLM (Wang et al., NeurIPS 2024).

Visual encoder optimization (VEO) first, then dependency mining, partition and joint search (CDM) on the optimized
tower. ``cdm=false`` and ``veo=false`` leave either out, and with both it is the layer-wise baseline: the rows of the
paper's Table 1.

``qvlm_jacobian`` is the same method with other defaults, which deviate from the paper where that measured better on
one draw of samples (docs/results-demo.md): errors weighed by Jacobians, a wider grid of ratios, corrected biases, the
tower's norms trained too. Its ranges leave the joint search nothing to gain: pulled in further they lower a block's
error and harm answers.
"""

from typing import Any

from torch import Tensor

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.methods.blocks import TokenWeights, decoder_inputs, replaced, stand_in
from qvlm_plugin.methods.build import activation_sites, build_plan
from qvlm_plugin.methods.gradients import require_answers
from qvlm_plugin.methods.qlora import observe_means, search_ranges
from qvlm_plugin.methods.qvlm.importance import search_important_ranges
from qvlm_plugin.methods.qvlm.mining import Mined, mine
from qvlm_plugin.methods.qvlm.options import QVLMOptions
from qvlm_plugin.methods.qvlm.vision import optimize_vision
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.scheme import UNQUANTIZED, Scheme
from qvlm_plugin.topology import Topology, decoder_layers, resolve
from qvlm_plugin.workspace import Workspace


def fit(
    name: str,
    loaded: LoadedModel,
    topology: Topology,
    scheme: Scheme,
    calibration: CalibrationSet | None,
    options: QVLMOptions,
    workspace: Workspace,
) -> RoundingPlan:
    """Layer-wise ranges to begin with (section 4.1), the tower's training, then the decoder's joint search.

    Args:
        name: of the method, for the plan.
        loaded, topology, scheme, calibration, options, workspace: see `Method`.
    """
    trains_vision = options.veo and scheme.vision.activation != UNQUANTIZED
    if trains_vision:
        require_answers(calibration, "visual encoder optimization to train on", "veo=false")
    if options.importance == "jacobian" and scheme.decoder.activation != UNQUANTIZED:
        require_answers(calibration, "importance=jacobian to look at", "importance=uniform")
    tensors, token_weights = _initial_ranges(loaded, topology, scheme, calibration, options)
    tensors |= observe_means(loaded, topology, scheme, calibration, options)
    record: dict[str, Any] = {}
    changed: tuple[str, ...] = ()
    if trains_vision:
        if (kept := workspace.recall("vision")) is None:
            vision = optimize_vision(loaded, topology, scheme, calibration, options, tensors)
            kept = {"replaced": vision.replaced, "veo": vision.record}, vision.tensors
            workspace.keep("vision", *kept)
        data, trained = kept
        tensors, changed, record["veo"] = tensors | trained, tuple(data["replaced"]), data["veo"]
    plan = build_plan(name, loaded, topology, scheme, options, tensors, calibration, replaced=changed)
    if options.cdm and scheme.decoder.activation != UNQUANTIZED:
        mined = _mine(loaded, topology, scheme, calibration, options, plan, workspace, token_weights)
        tensors, record["cdm"] = tensors | mined.tensors, mined.record
    return build_plan(name, loaded, topology, scheme, options, tensors, calibration, replaced=changed, record=record)


def _initial_ranges(
    loaded: LoadedModel,
    topology: Topology,
    scheme: Scheme,
    calibration: CalibrationSet | None,
    options: QVLMOptions,
) -> tuple[dict[str, Tensor], TokenWeights | None]:
    """Plan tensors of all sites, and the token weights that were found on the way, if errors are weighed."""
    formats = activation_sites(topology, loaded, scheme)
    static = [site for site, fmt in formats if fmt.kind == "static_channel"]
    if options.importance == "uniform" or not static:
        return search_ranges(loaded, formats, calibration, options) if formats else {}, None
    others = [(site, fmt) for site, fmt in formats if site not in static]
    tensors = search_ranges(loaded, others, calibration, options) if others else {}
    bits = scheme.decoder.activation
    found, token_weights = search_important_ranges(loaded, topology, static, bits, calibration, options)
    return tensors | found, token_weights


def _mine(
    loaded: LoadedModel,
    topology: Topology,
    scheme: Scheme,
    calibration: CalibrationSet,
    options: QVLMOptions,
    plan: RoundingPlan,
    workspace: Workspace,
    token_weights: TokenWeights | None,
) -> Mined:
    """Search the decoder's percentiles, starting from ``plan``, whose vision tower and projector are final."""
    model, batch_size = loaded.model, options.calibration_batch_size
    reference, batches = decoder_inputs(loaded, topology, calibration, batch_size)
    below = {
        module.name: stand_in(module, model.get_submodule(module.name), plan.tensors, REFERENCE)
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
        token_weights,
    )
