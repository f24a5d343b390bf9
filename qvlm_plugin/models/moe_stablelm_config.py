"""The configuration of MoE-LLaVA's language model, registered with transformers when this package is imported.

`qvlm_plugin.registration` adds it to transformers' tables during transformers' own imports. The model, which needs more
of these imports, is registered when a configuration is created.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.stablelm.configuration_stablelm import StableLmConfig


@strict
class MoEStableLmConfig(StableLmConfig):
    """Configuration of `qvlm_plugin.models.moe_stablelm.MoEStableLmModel`.

    Attributes:
        num_experts: number of experts of each layer that has experts.
        moe_layers: indices of these layers.
        router_noise_seed: DeepSpeed adds Gumbel noise to the choice of the second expert, also in evaluation; with a
            seed, this model does so reproducibly. None takes the second likeliest.
    """

    model_type = "moe_stablelm"

    num_experts: int = 4
    moe_layers: list[int] | tuple[int, ...] = ()
    router_noise_seed: int | None = None

    def __post_init__(self, **more: Any) -> None:
        """Register the model with ``AutoModel``, too."""
        from qvlm_plugin.models import moe_stablelm  # noqa: F401

        super().__post_init__(**more)
