"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: a vision tower, a projector of two Linears, a language model.

MoE-LLaVA is a LLaVA with another language model. LLaVA-NeXT and LLaVA-OneVision show the tower several crops of an
image; what they do with the projected features (unpad, a token at the end of each row) has no Linear in it.
"""

from transformers import PretrainedConfig

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.families import MODEL_TYPES
from qvlm_plugin.families.decoders import DECODERS
from qvlm_plugin.families.towers import VISION_TOWERS
from qvlm_plugin.topology import Group, Stack, Topology

TWO_LINEARS = Stack("", (Group(("linear_1",)), Group(("linear_2",))))
ONE_LINEAR = Stack("", (Group(("linear_1",)),), kept=("linear_2",))
"""The linear projector of LLaVA before v1.5: its second Linear is a unit matrix (see `qvlm_plugin.models.original`)."""


def llava_topology(config: PretrainedConfig) -> Topology | None:
    """The topology of these models; None for other families.

    Raises:
        QVLMError: the tower or the language model of such a model is not one of those described here.
    """
    if config.model_type not in MODEL_TYPES:
        return None
    tower, decoder = config.vision_config.model_type, config.text_config.model_type
    if tower not in VISION_TOWERS or decoder not in DECODERS:
        raise QVLMError(
            f"{config.model_type} model with vision tower {tower!r} and language model {decoder!r}: known towers are "
            f"{', '.join(VISION_TOWERS)}; known language models are {', '.join(DECODERS)}"
        )
    return Topology(
        vision_path="model.vision_tower",
        vision=VISION_TOWERS[tower],
        projector_path="model.multi_modal_projector",
        projector=ONE_LINEAR if config.projector_hidden_act == "linear" else TWO_LINEARS,
        decoder_path="model.language_model",
        decoder=DECODERS[decoder],
    )
