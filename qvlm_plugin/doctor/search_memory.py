"""The memory that a search needs on the model's device, computed without a search."""

from collections.abc import Mapping
from typing import Any

import torch

from qvlm_plugin.doctor.finding import Finding, Status
from qvlm_plugin.doctor.needs import open_skeleton, search_peaks
from qvlm_plugin.methods.footprint import Footprint
from qvlm_plugin.methods.peak import Peak, Setting
from qvlm_plugin.plan_request import PlanRequest


def check_search_memory(opening: Mapping[str, Any], request: PlanRequest, samples: int, tokens: int) -> list[Finding]:
    """The peak memory of a search in 16 bits, by step; also with caches on the CPU, and with offloaded weights.

    Args:
        opening: arguments that open a checkpoint, see `open_skeleton`; only its small files are read.
        request: the method, its options and the scheme.
        samples: number of calibration samples.
        tokens: tokens of the longest sample, including image and answer.

    Raises:
        QVLMError: the checkpoint cannot be read.
    """
    skeleton = open_skeleton(opening)

    def found(footprint: Footprint, offloaded: bool = False) -> list[Peak]:
        return search_peaks(skeleton, request, Setting(samples, tokens, offloaded=offloaded, footprint=footprint))

    steps, on_cpu = found(Footprint()), found(Footprint(caches_on_cpu=True))
    if not steps:
        return [Finding("search memory", Status.OK, f"method={request.method.name} needs no search")]
    offloaded = found(Footprint(caches_on_cpu=True), offloaded=True)
    needed = max(peak.bytes for peak in on_cpu)  # a search that runs out of memory moves its caches to the CPU
    message = (
        f"method={request.method.name}, scheme={request.scheme}, {samples} samples of {tokens} tokens: "
        f"{_largest(steps)} on the model's device ({', '.join(f'{p.step} {p.bytes / 1e9:.1f}' for p in steps)}); "
        f"{_largest(on_cpu)} with caches on the CPU, {_largest(offloaded)} with --device_map offload"
    )
    free = max((torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())), default=None)
    if free is None or free >= needed:
        return [Finding("search memory", Status.OK, message)]
    remedy = "search with qvlm search --device_map offload, or on a larger GPU"
    return [Finding("search memory", Status.WARN, f"{message}; the largest GPU has {free / 1e9:.1f} GB free", remedy)]


def _largest(found: list[Peak]) -> str:
    return f"{max(peak.bytes for peak in found) / 1e9:.1f} GB"
