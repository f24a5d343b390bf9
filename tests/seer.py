"""A vision-language model that nobody described: no path in it is that of a described family.

A tower of AIMv2, one Linear, a Phi-3, whose queries, keys and values are one Linear, as gates and ups are. The file is
also the code that comes with the checkpoint that `tiny_families.write_tiny_seer` writes.
"""

from typing import ClassVar

from torch import nn
from transformers import AutoConfig, AutoModel, GenerationMixin, PretrainedConfig, PreTrainedModel


class SeerConfig(PretrainedConfig):
    model_type = "seer"
    sub_configs: ClassVar = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(self, vision_config=None, text_config=None, image_token_id=3, **others):
        self.vision_config = _part(vision_config, "aimv2_vision_model")
        self.text_config = _part(text_config, "phi3")
        self.image_token_id = image_token_id
        super().__init__(**others)


def _part(config, kind):
    values = config.to_dict() if isinstance(config, PretrainedConfig) else dict(config or {})
    return AutoConfig.for_model(**{"model_type": kind, **values})


class Bridge(nn.Module):
    def __init__(self, read, written):
        super().__init__()
        self.calm = nn.LayerNorm(read)
        self.widen = nn.Linear(read, written)

    def forward(self, features):
        return self.widen(self.calm(features))


class Seer(PreTrainedModel, GenerationMixin):
    config_class = SeerConfig
    _supports_sdpa = True
    _no_split_modules = ("Aimv2EncoderLayer", "Phi3DecoderLayer")

    def __init__(self, config):
        super().__init__(config)
        self.eye = AutoModel.from_config(config.vision_config)
        self.bridge = Bridge(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.voice = AutoModel.from_config(config.text_config)
        self.mouth = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.voice.get_input_embeddings()

    def get_output_embeddings(self):
        return self.mouth

    def forward(self, input_ids=None, pixel_values=None, inputs_embeds=None, logits_to_keep=0, **others):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            seen = self.bridge(self.eye(pixel_values).last_hidden_state).to(inputs_embeds.dtype)
            shown = (input_ids == self.config.image_token_id).unsqueeze(-1)
            inputs_embeds = inputs_embeds.masked_scatter(shown, seen)
        output = self.voice(inputs_embeds=inputs_embeds, **others)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        output.logits = self.mouth(output.last_hidden_state[:, kept])
        return output
