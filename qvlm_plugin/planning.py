"""From a checked request to a quantized model: obtain its plan, searched or cached, and apply it."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from transformers import PretrainedConfig

from qvlm_plugin import backends, plugins
from qvlm_plugin.calibration import CalibrationSet, EncodedSet
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.kernels.selection import Execution
from qvlm_plugin.memory import trim_heap
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.run import fit
from qvlm_plugin.methods.shard import Shard
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.plan import RoundingPlan, apply_plan
from qvlm_plugin.plan_cache import cache_key, cached_plan
from qvlm_plugin.plan_request import PlanRequest, check_calibration
from qvlm_plugin.workspace import Workspace


def obtain_plan(
    loaded: LoadedModel,
    request: PlanRequest,
    calibration: CalibrationSet | None,
    cache: Path | None,
    shard: Shard | None = None,
) -> RoundingPlan:
    """The plan of a request: from the cache if it has one, else searched and stored.

    With a cache, an interrupted search resumes.

    Args:
        loaded: the model in full precision.
        request: see `check_request`.
        calibration: the samples; may be None if the request needs none.
        cache: folder of cached plans; None: no cache. Of several processes, only the first reads and writes it.
        shard: this process's share if several search together; None: this process searches alone.

    Raises:
        QVLMError: the model is already quantized, or its family is not supported; see `check_calibration` and `fit`.
    """
    require_full_precision(loaded.model.config, f"pretrained={loaded.source!r}")
    topology = plugins.topology_of(loaded)
    check_calibration(request, calibration)
    if not request.needs_calibration:
        calibration = None
    context = SearchContext(
        loaded, topology, request.scheme, request.options, calibration, request.method.name, shard=shard or Shard()
    )
    if cache is None:
        return _search(request, context)
    directory = cache / cache_key(loaded, request, calibration)
    return _cached(directory, context.shard, lambda space: _search(request, replace(context, workspace=space)))


def require_full_precision(config: PretrainedConfig, source: str) -> None:
    """Raise a QVLMError, which begins with ``source``, if the model of this configuration is already quantized."""
    if getattr(config, "quantization_config", None) is not None:
        raise QVLMError(f"{source} is already quantized; search on the model in full precision")


def _cached(directory: Path, shard: Shard, search: Callable[[Workspace], RoundingPlan]) -> RoundingPlan:
    """`cached_plan` for several processes: the first reads and writes the cache, all search together."""
    begun: list[bool] = []

    def searched(workspace: Workspace) -> RoundingPlan:
        begun.append(shard.first(lambda: True))
        return search(workspace)

    if shard.rank == 0:
        plan = cached_plan(directory, searched)
        if not begun:
            shard.first(lambda: False)
    elif shard.first(lambda: True):
        plan = search(Workspace())
    return shard.first(lambda: plan)


def _search(request: PlanRequest, context: SearchContext) -> RoundingPlan:
    """The method's plan, with the time of the search and the number of samples longer than the model's context."""
    start, loaded = time.perf_counter(), context.loaded
    encoded = context.calibration and context.calibration.encoded(loaded.processor, request.batch_size)
    over_context = encoded and _count_over_context(loaded, encoded)
    plan = fit(request.method, replace(context, calibration=encoded))
    record = plan.calibration and plan.calibration.model_copy(update={"over_context": over_context})
    return replace(plan, calibration=record, search_seconds=time.perf_counter() - start)


def _count_over_context(loaded: LoadedModel, calibration: EncodedSet) -> int:
    """The number of samples longer than the model's context; prints a warning if there are any."""
    if loaded.context is None:
        return 0
    count = sum(length > loaded.context for length in calibration.lengths)
    if count:
        Console(stderr=True).print(
            f"calibration={calibration.source!r}: {count} of {len(calibration.samples)} samples have more tokens than "
            f"the model's context of {loaded.context}",
            markup=False,
            soft_wrap=True,
        )
    return count


def prompt_warning(searched: str | None, loaded: LoadedModel) -> str | None:
    """A warning if a plan was searched on prompts of another format than ``loaded`` uses; else None.

    Args:
        searched: the plan's `CalibrationRecord.conv`; None if it is unknown.
        loaded: the model to run.
    """
    if searched in (None, loaded.conv):
        return None
    return (
        f"the plan was searched on prompts of conv={searched}, but the model runs with conv={loaded.conv}: its ranges "
        "were fitted to other prompts"
    )


def apply(plan: RoundingPlan, loaded: LoadedModel, backend: str = "reference", strict: bool = False) -> Execution:
    """Quantize the loaded model in place by ``plan``, with the kernels of ``backend`` (`backends.kernels`).

    Args:
        plan: a plan for this model.
        loaded: the model in full precision.
        backend: the name of a backend.
        strict: whether falling back to the reference is an error.

    Returns:
        Which kernel runs which module.

    Raises:
        QVLMError: see `apply_plan`; or the backend is unknown.
    """
    execution = apply_plan(plan, loaded.model, loaded.fingerprint, backends.kernels(backend), strict)
    plugins.notify_quantized(loaded, plan)
    trim_heap()  # the full-precision weights were freed
    return execution
