"""A plan's folder as version 0.1 wrote it, before plans held codes or rotations; with the hashes that it had."""

import json

import torch
from safetensors.torch import save_file

PLAN_HASH = "3b8bbd533c0fcbdccde0f86ca197133e5a3974a52c98bc98be22a61981cf183e"
TABLE_HASH = "b3a3b40d2ad2ad8f0024f1608c9cfa14e94089ffe2e199193736af72a725d1d1"

_PLAIN = {"group_size": None, "symmetric": False, "double_quantization": False, "clipped": False, "corrected": False}

HEADER = {
    "format": "qvlm-rounding-plan",
    "format_version": 1,
    "package_version": "0.1.0",
    "method": "awq",
    "scheme": "w4a4+vision:w4a8",
    "options": {"norm": 2.0},
    "model": "f" * 64,
    "calibration": {"source": "x.json", "seed": 1, "digests": ["0" * 64], "conv": None, "over_context": None},
    "search_seconds": 1.5,
    "tensors_sha256": "c2874d897f0e19c4e7259aed632c5606a9eafbf5960432e611086ec82624bec4",
    "modules": [
        {
            "name": "a.q",
            "part": "decoder",
            "site": "a.q",
            "shape": [4, 8],
            "weight": {"bits": 4, "kind": "int", **_PLAIN, "group_size": 4, "clipped": True},
            "activation": {"bits": 4, "kind": "static_channel"},
        },
        {
            "name": "b.fc",
            "part": "vision",
            "site": "b.fc",
            "shape": [2, 64],
            "weight": {"bits": 4, "kind": "nf", **_PLAIN, "double_quantization": True},
            "activation": {"bits": 8, "kind": "dynamic_token"},
        },
        {
            "name": "head",
            "part": "other",
            "site": None,
            "shape": [3, 8],
            "weight": {"bits": 16, "kind": "none", **_PLAIN},
            "activation": {"bits": 16, "kind": "none"},
        },
    ],
    "folds": [{"site": "a.q", "producer": "norm", "head_dim": None}],
    "replaced": ["norm.weight"],
    "record": {"uncalibrated": []},
}

TENSORS = {
    "a.q/lower": torch.linspace(-1, 0, 8),
    "a.q/upper": torch.linspace(0, 1, 8),
    "a.q/clip": torch.full((4, 2), 0.5),
    "a.q/scale": torch.full((8,), 2.0),
    "b.fc/clip_ratio": torch.ones(1),
    "norm.weight/value": torch.arange(8.0),
}


def write_recorded_plan(folder):
    """Write the folder; returns it."""
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(HEADER, indent=1) + "\n")
    save_file(TENSORS, folder / "plan.safetensors")
    return folder
