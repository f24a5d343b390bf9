"""PaliGemma's processor for conversations, which may have no image, and an answer.

transformers' processor inserts the beginning-of-sequence token and appends a line break in every text that it is given:
also after an answer and, without an image, in the middle of a word. Here the chat template writes both. PaliGemma
attends to a prompt in both directions and to an answer in one; ``token_type_ids`` mark the answer's tokens.
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
"""Chat template for checkpoints without one, as all released ones are."""


class PaliGemmaProcessor(transformers.PaliGemmaProcessor):
    """Leaves texts as they are. It has the name of transformers' class, which saved folders record.

    Attributes:
        answer_token_type: token type of an answer; that of a prompt is 0.
    """

    answer_token_type = 1

    def __call__(self, **given: Any) -> BatchFeature:
        """The model's inputs without labels, see `transformers.PaliGemmaProcessor`."""
        inputs = super().__call__(**given)
        inputs.pop("labels", None)
        return inputs

    def prepare_inputs_layout(self, **given: Any) -> tuple:
        """Only what every processor does."""
        return ProcessorMixin.prepare_inputs_layout(self, **given)

    def validate_inputs(self, **given: Any) -> None:
        """Only what every processor does."""
        ProcessorMixin.validate_inputs(self, **given)
