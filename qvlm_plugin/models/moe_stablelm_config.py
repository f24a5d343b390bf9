"""The configuration of MoE-LLaVA's language model, which transformers knows wherever this package is imported.

It is entered in transformers' tables by `qvlm_plugin.registration`, in the middle of transformers' own imports; the
model, which needs more of them, follows when a configuration is made.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.stablelm.configuration_stablelm import StableLmConfig


@strict
class MoEStableLmConfig(StableLmConfig):
    """Configuration of `qvlm_plugin.models.moe_stablelm.MoEStableLmModel`.

    Attributes:
        num_experts: experts of each layer that has some.
        moe_layers: indices of these layers.
        router_noise_seed: DeepSpeed chooses the second expert by probabilities with Gumbel noise, also when evaluating;
            with a seed so does this model, reproducibly. None takes the second likeliest.
    """

    model_type = "moe_stablelm"

    num_experts: int = 4
    moe_layers: list[int] | tuple[int, ...] = ()
    router_noise_seed: int | None = None

    def __post_init__(self, **more: Any) -> None:
        """Make the model known to ``AutoModel`` too."""
        from qvlm_plugin.models import moe_stablelm  # noqa: F401

        super().__post_init__(**more)
