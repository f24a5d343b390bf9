"""Topologies from a vision tower and a language model, whose types the configuration names; all families use this."""

from collections.abc import Mapping

from transformers import PretrainedConfig

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.families.decoders import DECODERS
from qvlm_plugin.families.towers import VISION_TOWERS
from qvlm_plugin.topology import Stack, Topology


def assembled(
    config: PretrainedConfig,
    *,
    vision_path: str,
    projector_path: str | tuple[str, ...],
    projector: Stack,
    decoder_path: str = "model.language_model",
) -> Topology:
    """The topology of a model whose tower and language model are described.

    Raises:
        QVLMError: the tower or the language model is not described.
    """
    return Topology(
        vision_path=vision_path,
        vision=_described(config, config.vision_config.model_type, "tower", VISION_TOWERS),
        projector_path=projector_path,
        projector=projector,
        decoder_path=decoder_path,
        decoder=_described(config, config.text_config.model_type, "language model", DECODERS),
    )


def _described(config: PretrainedConfig, kind: str, part: str, known: Mapping[str, Stack]) -> Stack:
    if kind not in known:
        raise QVLMError(
            f"{config.model_type} model with {part} {kind!r}: known {part}s are {', '.join(known)}; topology=traced "
            "finds the parts of other models by running them (docs/add-a-family.md)"
        )
    return known[kind]
