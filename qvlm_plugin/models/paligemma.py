"""PaliGemma's processor for conversations, which may have no image, and an answer.

That of transformers inserts the beginning-of-sequence token and appends a line break to every text that it is given:
also behind an answer, and without an image in the middle of a word. Here the chat template writes both. PaliGemma reads
a prompt in both directions and an answer in one; which tokens are an answer's is what ``token_type_ids`` say.
"""

from typing import Any

import transformers
from transformers import BatchFeature, ProcessorMixin

TEMPLATE = """\
{%- for message in messages -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}
{%- endfor -%}
{{ bos_token }}
{%- for message in messages -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{{ eos_token if message['role'] == 'assistant' else '\\n' }}
{%- endfor -%}
"""
"""Of checkpoints without a template, as all are that were released."""


class PaliGemmaProcessor(transformers.PaliGemmaProcessor):
    """Leaves texts as they are; of the same name, for the folders that it is saved to.

    Attributes:
        answer_token_type: of an answer's tokens; 0 is that of a prompt's.
    """

    answer_token_type = 1

    def __call__(self, **given: Any) -> BatchFeature:
        """The inputs of the model, without labels: see `transformers.PaliGemmaProcessor`."""
        inputs = super().__call__(**given)
        inputs.pop("labels", None)
        return inputs

    def prepare_inputs_layout(self, **given: Any) -> tuple:
        """What every processor does, and no more."""
        return ProcessorMixin.prepare_inputs_layout(self, **given)

    def validate_inputs(self, **given: Any) -> None:
        """What every processor does, and no more."""
        ProcessorMixin.validate_inputs(self, **given)
