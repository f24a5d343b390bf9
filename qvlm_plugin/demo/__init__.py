"""The embedded default: a real small LLaVA assembled from PyPI packages, and stand-in data to evaluate it on."""

TASKS = ("scienceqa", "vizwiz_vqa_val", "vqav2_val")
"""Those of lmms-eval's tasks that read the stand-in data where they run in its folder."""

CALIBRATION = "calibration/train.json"
"""The samples to calibrate on, in that folder."""


def resolve_demo(pretrained: str) -> str:
    """The checkpoint folder; the embedded model is built if need be."""
    if pretrained != "demo":
        return pretrained
    from qvlm_plugin.demo.model import build as build_model

    return str(build_model())
