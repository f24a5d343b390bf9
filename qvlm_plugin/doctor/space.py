"""Compare free disk space and memory with the needs of a model."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE

from qvlm_plugin.cache import cache_root
from qvlm_plugin.demo import resolve_demo
from qvlm_plugin.doctor.finding import Finding, Status
from qvlm_plugin.doctor.needs import Needs, open_skeleton, weight_needs
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.scheme import Scheme

FOR_PLANS = 1e9
"""Rough upper limit of the disk space of plans and of the steps of an unfinished search, in bytes."""

HEADROOM = 1.2
"""Rough ratio of a running model's memory to that of its weights; for searches see `needs.search_peaks`."""


def check_space(opening: Mapping[str, Any] | None, scheme: Scheme) -> list[Finding]:
    """Findings on memory and disk space, compared with the needs of a checkpoint if one is given.

    Args:
        opening: arguments that open the checkpoint, see `open_skeleton`.
        scheme: scheme of the packed weights.
    """
    needs, findings = None, []
    if opening is not None:
        try:
            opening = {**opening, "pretrained": resolve_demo(opening["pretrained"])}
            needs = weight_needs(open_skeleton(opening), scheme)
        except QVLMError as error:
            findings = [Finding("checkpoint", Status.FAIL, str(error), "choose another with --pretrained")]
    download = opening is not None and not Path(opening["pretrained"]).is_dir()
    return [*findings, *check_memory(needs), *check_disk(needs, download)]


def check_memory(needs: Needs | None) -> list[Finding]:
    """A finding for the memory of the machine, and one for that of each GPU."""
    found = [_memory("memory", psutil.virtual_memory().available, needs, "use a machine with more memory")]
    for index in range(torch.cuda.device_count()):
        free, _ = torch.cuda.mem_get_info(index)
        remedy = "use several GPUs with device_map=auto"
        found.append(_memory(f"memory of cuda:{index}", free, needs, remedy))
    return found


def check_disk(needs: Needs | None, download: bool) -> list[Finding]:
    """A finding for the folder of plans and, for a checkpoint that must be downloaded, one for the hub's cache."""
    found = [_disk("disk for plans", cache_root(), FOR_PLANS, "QVLM_CACHE")]
    if needs is not None and download:
        found.append(_disk("disk for checkpoints", Path(HF_HUB_CACHE), needs.full, "HF_HOME"))
    return found


def _memory(subject: str, free: float, needs: Needs | None, remedy: str) -> Finding:
    if needs is None:
        return Finding(subject, Status.OK, f"{_gigabytes(free)} free; pass --pretrained to see whether a model fits")
    message = (
        f"{_gigabytes(free)} free; about {_gigabytes(needs.full * HEADROOM)} for backend=reference, "
        f"{_gigabytes(needs.packed * HEADROOM)} for backend=packed; pass --method for the memory of its search"
    )
    if free >= needs.full * HEADROOM:
        return Finding(subject, Status.OK, message)
    if free >= needs.packed * HEADROOM:
        offload = "search with qvlm search --device_map offload, then run plan=DIR,backend=packed"
        return Finding(subject, Status.WARN, message, offload if "cuda" in subject else "search on a larger machine")
    return Finding(subject, Status.FAIL, message, remedy)


def _disk(subject: str, folder: Path, needed: float, variable: str) -> Finding:
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    message = f"{_gigabytes(free)} free in {folder}; about {_gigabytes(needed)} needed"
    if free >= needed:
        return Finding(subject, Status.OK, message)
    return Finding(subject, Status.FAIL, message, f"free some space, or set {variable} to another folder")


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
