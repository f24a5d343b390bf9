"""The embedded demo: a small real LLaVA assembled from PyPI packages, and stand-in data to evaluate it on."""

TASKS = ("scienceqa", "vizwiz_vqa_val", "vqav2_val")
"""The tasks of lmms-eval that read the stand-in data when they run in its folder."""

CALIBRATION = "calibration/train.json"
"""The calibration samples, in that folder."""


def resolve_demo(pretrained: str) -> str:
    """The checkpoint folder; for ``demo``, the embedded model's, which is built on first use."""
    if pretrained != "demo":
        return pretrained
    from qvlm_plugin.demo.model import build as build_model

    return str(build_model())
