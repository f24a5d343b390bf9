"""Prompt formats by name: how a conversation becomes text for models that were trained with LLaVA's code.

A format is data; `chat_template` writes it as the Jinja template that transformers' processors use. The names are those
of LLaVA's own ``--conv-mode``.
"""

from dataclasses import dataclass

from qvlm_plugin.errors import QVLMError

_CURIOUS = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
IMAGE = "<image>"
IMAGE_BETWEEN = "<im_start><image><im_end>"
"""How an image is written where the checkpoint was trained with ``mm_use_im_start_end``."""


@dataclass(frozen=True)
class PromptFormat:
    """A prompt format.

    Attributes:
        system: the text that opens a conversation without a system message.
        user, assistant: what introduces a turn; the latter, without blanks at its end, is where an answer begins.
        after_user, after_assistant: what ends a turn; ``after_user`` ends the opening too.
        stop: text at which an answer ends, where no special token does that; empty otherwise.
    """

    system: str
    user: str
    assistant: str
    after_user: str
    after_assistant: str
    stop: str = ""


PROMPT_FORMATS = {
    "vicuna_v1": PromptFormat(_CURIOUS.format(who="user"), "USER: ", "ASSISTANT: ", " ", "</s>"),
    "llava_v1": PromptFormat(_CURIOUS.format(who="human"), "USER: ", "ASSISTANT: ", " ", "</s>"),
    "llava_v0": PromptFormat(_CURIOUS.format(who="human"), "Human: ", "Assistant: ", "###", "###", stop="###"),
    "stablelm": PromptFormat(_CURIOUS.format(who="user"), "USER: ", "ASSISTANT: ", " ", "<|endoftext|>"),
    "plain": PromptFormat("", "", "", "\n", "\n", stop="\n"),
}
"""The formats that ``conv=`` names; all but ``plain`` are for chats."""

_TEMPLATE = """\
{%- macro text(message) -%}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{{ '@IMAGE@\\n' if part['type'] == 'image' else part['text'] }}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
{{ text(messages[0]) + '@AFTER_USER@' }}
{%- set turns = messages[1:] -%}
{%- else -%}
{{ '@OPENING@' }}
{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] == 'assistant' -%}
{{ '@ASSISTANT@' + text(message) + '@AFTER_ASSISTANT@' }}
{%- else -%}
{{ '@USER@' + text(message) + '@AFTER_USER@' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '@ANSWER@' }}{%- endif -%}
"""


def prompt_format(name: str) -> PromptFormat:
    """The format of that name.

    Raises:
        QVLMError: there is none.
    """
    if name not in PROMPT_FORMATS:
        raise QVLMError(f"conv={name!r} is not known; allowed are {', '.join(PROMPT_FORMATS)}")
    return PROMPT_FORMATS[name]


def chat_template(prompt: PromptFormat, image: str = IMAGE) -> str:
    """The format as a Jinja template; every image is written as ``image`` and a line break."""
    values = {
        "@IMAGE@": image,
        "@OPENING@": prompt.system + prompt.after_user if prompt.system else "",
        "@USER@": prompt.user,
        "@ASSISTANT@": prompt.assistant,
        "@ANSWER@": prompt.assistant.rstrip(),
        "@AFTER_USER@": prompt.after_user,
        "@AFTER_ASSISTANT@": prompt.after_assistant,
    }
    template = _TEMPLATE
    for name, value in values.items():
        escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        template = template.replace(name, escaped)
    return template


def name_of(template: str) -> str | None:
    """The name of the format that a Jinja template was written from; None for a template of other origin."""
    for name, prompt in PROMPT_FORMATS.items():
        if template in (chat_template(prompt), chat_template(prompt, IMAGE_BETWEEN)):
            return name
    return None
