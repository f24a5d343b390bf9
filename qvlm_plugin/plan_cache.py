"""The cache of plans on disk: each plan is searched once, by one of the processes that need it.

A plan's key covers all that determines it: the model, its topology and prompts, scheme, method, options, calibration
data, code, and the arithmetic in which the model ran (device, dtype, attention).
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from qvlm_plugin import plugins
from qvlm_plugin.atomic import make_folder
from qvlm_plugin.cache import sources_digest
from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.models.placement import device_name, execution_device
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.plan_request import PlanRequest
from qvlm_plugin.reading import one_line
from qvlm_plugin.workspace import Workspace


def cache_key(loaded: LoadedModel, request: PlanRequest, calibration: CalibrationSet | None) -> str:
    """Name of the cached plan: SHA-256 over all that determines it, including the method's own code."""
    method = request.method
    modules = {"qvlm_plugin", method.options.__module__, *(step.run.__module__ for step in method.steps)}
    packages = sorted({module.partition(".")[0] for module in modules})
    content = {
        "sources": [sources_digest(package) for package in packages],
        "model": loaded.fingerprint,
        "dtype": str(loaded.model.dtype),
        "device": device_name(execution_device(loaded.model)),
        "attention": loaded.model.config._attn_implementation,
        "topology": repr(plugins.topology_of(loaded)),
        "prompts": loaded.processor.chat_template,
        "method": request.method.name,
        "options": request.options.model_dump(mode="json"),
        "scheme": str(request.scheme),
        "calibration": calibration and [calibration.source, calibration.seed, calibration.content_hash()],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cached_plan(directory: Path, search: Callable[[Workspace], RoundingPlan]) -> RoundingPlan:
    """The plan in ``directory``; if it is missing or damaged, it is searched and stored there.

    Meanwhile, other processes that need the same plan wait. The finished steps of an interrupted search stay in
    ``<directory>.steps`` until a later search completes.

    Args:
        directory: the plan's folder; its name should be a `cache_key`.
        search: returns the plan, and resumes from the steps that the workspace has.

    Raises:
        QVLMError: ``search`` raises it, or the plan cannot be written.
    """
    workspace = Workspace(directory.with_name(f"{directory.name}.steps"))
    if (found := _stored(directory)) is not None:  # before any lock: the folder may be read-only
        workspace.discard()  # steps of a search that was killed between saving its plan and discarding them
        return found
    make_folder(directory.parent)
    with _locked(directory.with_name(f"{directory.name}.lock")):
        if (found := _stored(directory)) is not None:  # another process searched it meanwhile
            return found
        plan = search(workspace)
        plan.save(directory)
        workspace.discard()
        return plan


def _stored(directory: Path) -> RoundingPlan | None:
    try:
        return RoundingPlan.load(directory)
    except QVLMError:  # absent or damaged
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
