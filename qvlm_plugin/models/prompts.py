"""Prompt formats by name: how a conversation becomes text for models that were trained with LLaVA's code.

A format is data; `chat_template` writes it as the Jinja template that transformers' processors use. The names are those
of LLaVA's own ``--conv-mode``.
"""

from dataclasses import dataclass
from itertools import product

from qvlm_plugin.errors import QVLMError

_CURIOUS = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
IMAGE = "<image>"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
"""Tokens around an image if the checkpoint was trained with ``mm_use_im_start_end``."""


@dataclass(frozen=True)
class PromptFormat:
    """A prompt format.

    Attributes:
        system: the text that opens a conversation without a system message.
        user, assistant: text that introduces a turn; an answer begins after ``assistant`` without its final blanks.
        after_user, after_assistant: text that ends a turn; ``after_user`` also ends the opening.
        stop: text at which an answer ends if no special token ends it; empty otherwise.
    """

    system: str
    user: str
    assistant: str
    after_user: str
    after_assistant: str
    stop: str = ""


@dataclass(frozen=True)
class PromptStyle:
    """How a checkpoint writes any format.

    Attributes:
        between: whether an image stands between `IMAGE_START` and `IMAGE_END`.
        blanks: whether the text before the first image and after each image begins with sentencepiece's blank. LLaVA
            tokenizes these texts one by one, and its tokenizer puts the blank there. A fast tokenizer does so itself
            only if the blank follows every special token (see `qvlm_plugin.models.llama_tokenizer`).
    """

    between: bool = False
    blanks: bool = False


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
{{ '@IMAGE@' + ('' if part['inline'] else '\\n') if part['type'] == 'image' else part['text'] }}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro conversation() -%}
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
{%- endmacro -%}
"""
_PLAIN = "{{ conversation() }}\n"
_WITH_BLANKS = """\
{%- for piece in conversation().split('<image>') -%}
{{ ('' if loop.first else '<image>') + ('▁' + piece if piece else '') }}
{%- endfor -%}
"""


def prompt_format(name: str) -> PromptFormat:
    """The prompt format with this name.

    Raises:
        QVLMError: there is none.
    """
    if name not in PROMPT_FORMATS:
        raise QVLMError(f"conv={name!r} is not known; allowed are {', '.join(PROMPT_FORMATS)}")
    return PROMPT_FORMATS[name]


def chat_template(prompt: PromptFormat, style: PromptStyle | None = None) -> str:
    """The format as a Jinja template.

    An image part is written as an image token and a line break; one with ``inline`` is not followed by a line break.
    """
    style = style or PromptStyle()
    values = {
        "@IMAGE@": IMAGE_START + IMAGE + IMAGE_END if style.between else IMAGE,
        "@OPENING@": prompt.system + prompt.after_user if prompt.system else "",
        "@USER@": prompt.user,
        "@ASSISTANT@": prompt.assistant,
        "@ANSWER@": prompt.assistant.rstrip(),
        "@AFTER_USER@": prompt.after_user,
        "@AFTER_ASSISTANT@": prompt.after_assistant,
    }
    template = _TEMPLATE + (_WITH_BLANKS if style.blanks else _PLAIN)
    for name, value in values.items():
        escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
        template = template.replace(name, escaped)
    return template


def origin_of(template: str) -> tuple[str, PromptStyle] | None:
    """The format's name and the style that a Jinja template was written from; None for a template of other origin."""
    for name, between, blanks in product(PROMPT_FORMATS, (False, True), (False, True)):
        style = PromptStyle(between, blanks)
        if template == chat_template(PROMPT_FORMATS[name], style):
            return name, style
    return None


def name_of(template: str) -> str | None:
    """The name of the format that a Jinja template was written from; None for a template of other origin."""
    origin = origin_of(template)
    return origin and origin[0]
