"""The Python interface: search a plan for a model in memory, apply it, save it.

`qvlm_plugin` exports these names, and imports them when they are first used.

    import qvlm_plugin as qvlm

    model = qvlm.quantize(model, processor, method="qvlm_rotated", scheme="w4a4", calibration="llava_mix.json:64")

    plan = qvlm.search(model, processor, method="awq", scheme="w4a16", calibration=samples, group_size=64)
    plan.save("plans/awq-w4a16")
    model = qvlm.apply(qvlm.RoundingPlan.load("plans/awq-w4a16"), model)
"""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from qvlm_plugin import backends, planning
from qvlm_plugin.calibration import CalibrationSet, Sample, read_calibration
from qvlm_plugin.commands.shared import draw_from_task
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.loading import LoadedModel, prepare
from qvlm_plugin.models.prompts import name_of
from qvlm_plugin.plan import RoundingPlan, apply_plan
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.topology import Topology
from qvlm_plugin.tracing.trace import check_topology, trace_model

Calibration = str | CalibrationSet | Sequence[tuple[Image.Image, str, str]] | None


def search(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    method: str = "qlora",
    scheme: str = "w4a4",
    calibration: Calibration = None,
    topology: str | Topology = "described",
    **options: Any,
) -> RoundingPlan:
    """Search a plan; the model is left unchanged.

    The plan belongs to the tensors of this model. For a plan of a checkpoint's files, which ``plan=`` of an evaluation
    takes, use ``qvlm search``.

    Args:
        model: a transformers model of a supported family, in full precision.
        processor: its processor, with a chat template.
        method: a name that ``qvlm methods`` lists.
        scheme: bits, for example ``w4a4`` or ``w4a4+vision:w8a8``.
        calibration: triples of an image, a question and its answer; or sources as in ``calibration=``, for example
            ``file.json:64`` or ``scienceqa:train:64``; None for methods that need none.
        topology: where the model's parts are: ``described`` by a plugin; ``traced``, by a run, for a family without a
            description; or a description of your own.
        options: options of the method.

    Raises:
        QVLMError: a name or a value is not allowed, the family is not supported, or samples are missing or too few.
    """
    request = check_request(method, scheme, options)
    samples = _samples(calibration) if request.needs_calibration else None
    processor = copy.deepcopy(processor)
    prepare(processor, "processor")
    parts = _topology(model, processor, topology)
    prompt = name_of(processor.chat_template)
    loaded = LoadedModel(model.eval(), processor, "a model in memory", fingerprint(model), prompt, topology=parts)
    return planning.obtain_plan(loaded, request, samples, cache=None)


def apply(plan: RoundingPlan, model: PreTrainedModel, backend: str = "auto") -> PreTrainedModel:
    """Quantize a model in place, and return it.

    Args:
        plan: a plan from `search` for the same tensors.
        model: the model in full precision.
        backend: the kernels, as in ``backend=`` of an evaluation.

    Raises:
        QVLMError: the plan was made for another model, or the backend is unknown.
    """
    apply_plan(plan, model, fingerprint(model), backends.kernels(backend))
    return model


def quantize(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    method: str = "qlora",
    scheme: str = "w4a4",
    calibration: Calibration = None,
    topology: str | Topology = "described",
    **options: Any,
) -> PreTrainedModel:
    """`search` a plan, and `apply` it with ``backend="auto"``."""
    plan = search(model, processor, method, scheme, calibration, topology, **options)
    apply_plan(plan, model, plan.model, backends.kernels("auto"))  # the search has hashed this model's tensors
    return model


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of a model's tensors and their names.

    Raises:
        QVLMError: a tensor is not in memory.
    """
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise QVLMError(f"{name} is offloaded; all tensors of the model must be in memory")
        sha.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        sha.update(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _topology(model: PreTrainedModel, processor: ProcessorMixin, topology: str | Topology) -> Topology | None:
    if isinstance(topology, Topology):
        return topology
    check_topology(topology)
    return trace_model(model, processor) if topology == "traced" else None


def _samples(calibration: Calibration) -> CalibrationSet | None:
    if calibration is None or isinstance(calibration, CalibrationSet):
        return calibration
    if isinstance(calibration, str):
        return read_calibration(calibration, None, 0, draw_from_task)
    triples = (Sample(Conversation.from_prompt(question, [image]), answer) for image, question, answer in calibration)
    return CalibrationSet(tuple(triples))
