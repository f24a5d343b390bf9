"""From a request to a quantized model: check it, search the plan or find it in the cache, apply it.

Cached plans are keyed by what decides them: model, prompts, scheme, method, options, calibration data, code, and the
arithmetic that the model ran in (device, dtype, attention). Processes that want the same plan at once wait for the one
that searches it.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel, ValidationError
from rich.console import Console

from qvlm_plugin import backends, plugins
from qvlm_plugin.atomic import make_folder
from qvlm_plugin.cache import sources_digest
from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.kernels.selection import Execution
from qvlm_plugin.memory import trim_heap
from qvlm_plugin.methods.base import Method
from qvlm_plugin.methods.context import SearchContext
from qvlm_plugin.methods.run import fit
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.models.placement import device_name, execution_device
from qvlm_plugin.plan import RoundingPlan, apply_plan
from qvlm_plugin.reading import one_line
from qvlm_plugin.scheme import Scheme
from qvlm_plugin.topology import Topology
from qvlm_plugin.workspace import Workspace


@dataclass(frozen=True)
class PlanRequest:
    """A method with its options, and a scheme: checked, before any weight is loaded."""

    method: Method
    scheme: Scheme
    options: BaseModel

    @property
    def needs_calibration(self) -> bool:
        """Whether `obtain_plan` needs a calibration set for it."""
        return self.method.needs_calibration(self.scheme, self.options)


def check_request(method: str, scheme: str, options: Mapping[str, Any]) -> PlanRequest:
    """Validate the names and values of a request.

    Raises:
        QVLMError: the method or an option is unknown, or a value is not allowed.
    """
    known = plugins.method(method)
    parsed = Scheme.parse(scheme)
    allowed = ", ".join(known.options.model_fields) or "none"
    if unknown := sorted(options.keys() - known.options.model_fields.keys()):
        raise QVLMError(f"unknown argument {unknown[0]!r}; method={method} takes these options: {allowed}")
    try:
        return PlanRequest(known, parsed, known.options.model_validate(dict(options)))
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]}={first['input']!r} is not allowed for " if first["loc"] else ""
        raise QVLMError(f"{where}method={method}: {first['msg'].removeprefix('Value error, ')}") from error


def check_calibration(request: PlanRequest, calibration: CalibrationSet | None) -> None:
    """Check that a request has the calibration data that it needs; this takes no model.

    Raises:
        QVLMError: they are missing, or fewer than a batch.
    """
    if not request.needs_calibration:
        return
    if calibration is None:
        raise QVLMError(f"method={request.method.name} with scheme={request.scheme} needs calibration data")
    count, batch_size = len(calibration.samples), getattr(request.options, "calibration_batch_size", 1)
    if count < batch_size:
        raise QVLMError(
            f"calibration={calibration.source!r} has {count} samples, less than calibration_batch_size={batch_size}; "
            f"draw at least {batch_size} samples, or set calibration_batch_size to at most {count}"
        )


def obtain_plan(
    loaded: LoadedModel, request: PlanRequest, calibration: CalibrationSet | None, cache: Path | None
) -> RoundingPlan:
    """The plan of a request: from the cache when it is there, else searched and stored.

    A search that was interrupted goes on where it stopped, if it had a cache to keep its steps in.

    Args:
        loaded: the model in full precision.
        request: see `check_request`.
        calibration: the samples; may be None where the request needs none.
        cache: folder of cached plans; None neither reads nor writes any.

    Raises:
        QVLMError: the model is quantized, the family is not supported; see `check_calibration` and `fit`.
    """
    if getattr(loaded.model.config, "quantization_config", None) is not None:
        raise QVLMError(f"pretrained={loaded.source!r} is quantized already; search on the model in full precision")
    topology = plugins.topology(loaded.model.config)
    check_calibration(request, calibration)
    if not request.needs_calibration:
        calibration = None
    return _obtain(loaded, topology, request, calibration, cache)


def _obtain(
    loaded: LoadedModel,
    topology: Topology,
    request: PlanRequest,
    calibration: CalibrationSet | None,
    cache: Path | None,
) -> RoundingPlan:
    def search(workspace: Workspace) -> RoundingPlan:
        start = time.perf_counter()
        over_context = calibration and _count_over_context(loaded, calibration)
        context = SearchContext(
            loaded, topology, request.scheme, request.options, calibration, request.method.name, workspace
        )
        plan = fit(request.method, context)
        record = plan.calibration and plan.calibration.model_copy(update={"over_context": over_context})
        return replace(plan, calibration=record, search_seconds=time.perf_counter() - start)

    if cache is None:
        return search(Workspace())
    directory = cache / cache_key(loaded, request, calibration)
    workspace = Workspace(directory.with_name(f"{directory.name}.steps"))
    if (found := _cached(directory)) is not None:  # also where the cache cannot be written
        workspace.discard()  # what a search left that was killed at its very end
        return found
    make_folder(cache)
    with _locked(cache / f"{directory.name}.lock"):
        if (found := _cached(directory)) is not None:  # another process searched it meanwhile
            return found
        plan = search(workspace)
        plan.save(directory)
        workspace.discard()
        return plan


def _count_over_context(loaded: LoadedModel, calibration: CalibrationSet) -> int:
    """How many samples are longer than the model's context; says so where there are any."""
    if loaded.context is None:
        return 0
    count = sum(length > loaded.context for length in calibration.lengths(loaded.processor))
    if count:
        Console(stderr=True).print(
            f"calibration={calibration.source!r}: {count} of {len(calibration.samples)} samples have more tokens than "
            f"the model's context of {loaded.context}",
            markup=False,
            soft_wrap=True,
        )
    return count


def _cached(directory: Path) -> RoundingPlan | None:
    try:
        return RoundingPlan.load(directory)
    except QVLMError:  # absent, or damaged: to be searched
        return None


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    lock = FileLock(file)
    try:
        lock.acquire()
    except OSError as error:
        raise QVLMError(f"{str(file)!r} cannot be written: {one_line(error)}") from error
    try:
        yield
    finally:
        lock.release()


def cache_key(loaded: LoadedModel, request: PlanRequest, calibration: CalibrationSet | None) -> str:
    """Name of the cached plan: SHA-256 over all that decides it, the method's own code included."""
    modules = {
        "qvlm_plugin",
        request.method.options.__module__,
        *(step.run.__module__ for step in request.method.steps),
    }
    packages = sorted({module.partition(".")[0] for module in modules})
    content = {
        "sources": [sources_digest(package) for package in packages],
        "model": loaded.fingerprint,
        "dtype": str(loaded.model.dtype),
        "device": device_name(execution_device(loaded.model)),
        "attention": loaded.model.config._attn_implementation,
        "prompts": loaded.processor.chat_template,
        "method": request.method.name,
        "options": request.options.model_dump(mode="json"),
        "scheme": str(request.scheme),
        "calibration": calibration and [calibration.source, calibration.seed, calibration.content_hash()],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def prompt_warning(searched: str | None, loaded: LoadedModel) -> str | None:
    """What to say where a plan was searched on prompts of another format than ``loaded`` forms; None if nothing.

    Args:
        searched: the plan's `CalibrationRecord.conv`; None where it has none.
        loaded: the model to run.
    """
    if searched in (None, loaded.conv):
        return None
    return (
        f"the plan was searched on prompts of conv={searched}, and the model runs with conv={loaded.conv}: its ranges "
        "are those of other prompts"
    )


def apply(plan: RoundingPlan, loaded: LoadedModel, backend: str = "reference", strict: bool = False) -> Execution:
    """Quantize the loaded model in place by ``plan``, with the arithmetic that ``backend`` names (`backends.kernels`).

    Returns:
        Which kernel serves which module; ``strict`` makes falling back to the reference an error.

    Raises:
        QVLMError: see `apply_plan`; or the backend is unknown.
    """
    execution = apply_plan(plan, loaded.model, loaded.fingerprint, backends.kernels(backend), strict)
    plugins.tell_quantized(loaded, plan)
    trim_heap()  # of weights in full precision
    return execution
