"""Translate the harness's generation arguments to transformers', and stop at strings.

Decoding is plain and greedy unless a task (``generation_kwargs``) or the user (``--gen_kwargs``) sets something else.
``do_sample=True``, or a temperature above 0 without ``do_sample=False``, selects sampling; a temperature of 0 always
means greedy. Of a checkpoint's generation_config.json only the begin, end and padding tokens are used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from qvlm_plugin.errors import QVLMError

_ALIASES = {"max_gen_toks": "max_new_tokens", "max_tokens": "max_new_tokens"}
_STOP_KEYS = ("until", "stop_sequences", "stop_strings")
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_WITH_PROMPT = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}
_IGNORED = ("image_aspect_ratio",)
"""Arguments that task definitions set for other models' image processing."""

Texts = str | list[str]
Tokens = list[int]


class _Allowed(BaseModel):
    """Arguments that a task may set: stop strings (three names), a seed, and fields of transformers' GenerationConfig.

    Fields that change what ``generate`` returns, padding, or the number of tokens per step are not allowed; nor are
    lengths that include the prompt and its padding, which would make an answer depend on its batch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    until: Texts = []
    stop_sequences: Texts = []
    stop_strings: Texts = []
    seed: int | None = Field(None, ge=0)
    skip_special_tokens: bool = True
    max_new_tokens: int | None = Field(None, ge=1)
    min_new_tokens: int | None = Field(None, ge=0)
    max_time: float | None = Field(None, gt=0)
    do_sample: bool = False
    temperature: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    epsilon_cutoff: float | None = Field(None, ge=0, lt=1)
    eta_cutoff: float | None = Field(None, ge=0, lt=1)
    num_beams: int | None = Field(None, ge=1)
    num_return_sequences: int | None = Field(None, ge=1, le=1)
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    repetition_penalty: float | None = Field(None, gt=0)
    encoder_repetition_penalty: float | None = Field(None, gt=0)
    no_repeat_ngram_size: int | None = Field(None, ge=0)
    encoder_no_repeat_ngram_size: int | None = Field(None, ge=0)
    bad_words_ids: list[Tokens] | None = None
    suppress_tokens: Tokens | None = None
    begin_suppress_tokens: Tokens | None = None
    forced_eos_token_id: int | Tokens | None = None
    eos_token_id: int | Tokens | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    renormalize_logits: bool | None = None
    remove_invalid_values: bool | None = None
    use_cache: bool | None = None


@dataclass(frozen=True)
class Generation:
    """How to generate a group of answers.

    Attributes:
        arguments: arguments of transformers' ``generate``.
        stops: strings that end an answer; an answer is cut before them.
        skip_special_tokens: whether to leave special tokens out of the answer.
        seed: seed of sampling; None continues the harness's random state.
    """

    arguments: Mapping[str, Any]
    stops: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    seed: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All settings as JSON data for the results."""
        more = {"until": list(self.stops), "skip_special_tokens": self.skip_special_tokens, "seed": self.seed}
        return {**self.arguments, **more}

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: min([found for stop in self.stops if (found := text.find(stop)) >= 0], default=len(text))]


def read_generation(
    given: Mapping[str, Any], default_max_new_tokens: int, task: str, stops_of_model: Sequence[str] = ()
) -> Generation:
    """Translate the generation arguments of ``task``; answers end at ``stops_of_model`` too.

    Raises:
        QVLMError: an argument is unknown, has a value of the wrong type, or requests more than one answer.
    """
    given = {_ALIASES.get(name, name): value for name, value in given.items() if name not in _IGNORED}
    given = {name: value for name, value in given.items() if value is not None and value != "None"}
    try:
        arguments = _Allowed.model_validate(given).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise QVLMError(f"task {task}: {_explain(error)}") from error
    stops = list(stops_of_model)
    for key in _STOP_KEYS:
        value = arguments.pop(key, ())
        stops += [value] if isinstance(value, str) else value
    skip_special_tokens, seed = arguments.pop("skip_special_tokens", True), arguments.pop("seed", None)
    temperature = arguments.get("temperature")
    sampling = arguments.get("do_sample", bool(temperature)) and temperature != 0
    if not sampling:
        arguments = {name: value for name, value in arguments.items() if name not in _SAMPLING_KEYS}
    arguments.setdefault("max_new_tokens", default_max_new_tokens)
    return Generation(
        {**arguments, "do_sample": bool(sampling)}, tuple(stop for stop in stops if stop), skip_special_tokens, seed
    )


def _explain(error: ValidationError) -> str:
    problem = error.errors()[0]
    name, value = problem["loc"][0], problem["input"]
    if name in _WITH_PROMPT:
        return f"{name} includes the prompt and its padding, which depends on the batch; use {_WITH_PROMPT[name]}"
    if problem["type"] == "extra_forbidden":
        return f"unknown generation argument {name}; allowed are {', '.join(_Allowed.model_fields)}"
    if name in _STOP_KEYS:
        return f"generation argument {name}={value!r} is neither a text nor a list of texts"
    if name == "num_return_sequences":
        return "num_return_sequences must be 1; use --repeats to repeat a question"
    return f"generation argument {name}={value!r} is not allowed: {problem['msg'].lower()}"


class StopAtText(StoppingCriteria):
    """Ends a row of a batch once its generated text contains a stop string.

    transformers' own stop strings also match text that begins in the prompt; this checks generated tokens only.
    """

    def __init__(self, stops: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self._stops = stops
        self._tokenizer = tokenizer
        self._start = prompt_length
        # A token adds at least one byte, so a stop string that has just ended lies within this many last tokens.
        self._window = max(len(stop.encode()) for stop in stops) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether each row of ``input_ids`` [B, T] is finished: bool [B]."""
        tails = input_ids[:, max(self._start, input_ids.shape[1] - self._window) :]
        texts = self._tokenizer.batch_decode(tails, skip_special_tokens=True)
        finished = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(finished, device=input_ids.device)
