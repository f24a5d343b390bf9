"""The arguments in ``--model_args``.

lmms-eval guesses the types of values: ``true`` becomes a bool, ``8`` an int, ``1.0`` a float, ``None`` the text "None".
All values are validated here, once. Names not listed are options of the quantization method.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from qvlm_plugin import plugins
from qvlm_plugin.cache import cache_root
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.dtypes import DTYPES
from qvlm_plugin.models.prompts import PROMPT_FORMATS, prompt_format

_OF_THE_SEARCH = ("method", "scheme", "calibration", "images", "seed", "cache")
"""Arguments that cannot be combined with a saved plan."""


class ModelArguments(BaseModel):
    """The arguments of ``--model qvlm``.

    Excluded fields are not written in ``--model_args``: lmms-eval passes them from its own options.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    pretrained: str = Field(description="checkpoint folder, hub id, or 'demo' for the embedded small model")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: str = Field("auto", description=f"compute type: {', '.join(DTYPES)}")
    device: str | None = Field(None, description="cpu, cuda, cuda:1; default: the accelerator if there is one")
    device_map: str | None = Field(None, description="auto spreads the model over all devices")
    attn_implementation: str | None = Field(None, description="eager, sdpa, flash_attention_2")
    trust_remote_code: bool = Field(False, description="run code that comes with the checkpoint")
    conv: str | None = Field(
        None, description=f"prompt format, by default the checkpoint's: {', '.join(PROMPT_FORMATS)}"
    )
    router_noise_seed: int | None = Field(None, ge=0, description="seed of noise in the choice of experts (MoE-LLaVA)")
    image_aspect_ratio: str | None = Field(
        None, description="square or pad, by default the checkpoint's (LLaVA's own layout)"
    )
    topology: Literal["described", "traced"] = Field(
        "described", description="traced finds the parts by running the model, for families that are not described"
    )
    method: str = Field("none", description="quantization method")
    scheme: str = Field("w4a4", description="bit widths, for example w4a4+vision:w8a8")
    plan: Path | None = Field(None, description="folder of a saved rounding plan, instead of method and scheme")
    calibration: str | None = Field(
        "scienceqa:train:64", description="task:split:n or file.json:n; several are joined by +"
    )
    images: Path | None = Field(None, description="folder of the images that calibration files name")
    seed: int = Field(0, ge=0, description="seed of the calibration draw and the search")
    cache: Path | None = Field(
        default_factory=lambda: cache_root() / "plans",
        description="folder of searched plans, by default in $QVLM_CACHE or ~/.cache/qvlm_plugin; none: search again",
    )
    backend: str = Field(
        "reference", description="arithmetic of the plan: auto, packed, reference or one kernel's name"
    )
    compile: bool = Field(
        False,
        description="compile decoding with torch.compile: minutes at the start, then faster tokens",
    )
    strict: bool = Field(False, description="fail if a Linear would fall back to the reference arithmetic")
    allow_overlap: bool = Field(False, description="allow evaluating documents that were calibrated on")
    batch_size: int = Field(1, ge=1, exclude=True, description="documents per forward pass")
    max_new_tokens: int = Field(32, ge=1, description="maximum answer length for tasks that set none")
    system_prompt: str | None = Field(None, description="a system message, as text or as a file with the text")

    @field_validator(
        "revision", "device", "device_map", "attn_implementation", "plan", "calibration", "images", "cache",
        "system_prompt", "conv", "router_noise_seed", "image_aspect_ratio", mode="before",
    )  # fmt: skip
    @classmethod
    def _parse_none(cls, value: object) -> object:
        return None if isinstance(value, str) and value.lower() == "none" else value

    @property
    def options(self) -> dict[str, Any]:
        """Options of the quantization method: every argument that this model does not name."""
        return dict(self.model_extra or {})


def merge_arguments(text: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Combine ``--model_args`` with lmms-eval's own options.

    Args:
        text: the arguments in ``--model_args``.
        options: ``batch_size``, ``max_batch_size`` and ``device``; None if the option was not given.

    Raises:
        QVLMError: an argument is given twice, or as an option or argument that is not allowed.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if "max_batch_size" in given:
        raise QVLMError("--max_batch_size is not supported: no batch size is searched; write --batch_size 8")
    if "batch_size" in text:
        raise QVLMError(f"batch_size is an option of lmms-eval: write --batch_size {text['batch_size']}")
    if "device" in text and "device" in given:
        raise QVLMError(f"device is given twice: --device {given['device']} and device={text['device']}; leave one out")
    return {**text, **given}


def parse_arguments(values: Mapping[str, Any]) -> ModelArguments:
    """Validate the model arguments.

    Raises:
        QVLMError: one is missing, of the wrong type or out of range, or contradicts another.
    """
    try:
        arguments = ModelArguments.model_validate(dict(values))
    except ValidationError as error:
        raise QVLMError("; ".join(_explain(problem) for problem in error.errors())) from error
    known = plugins.method(arguments.method).options.model_fields
    if unknown := sorted(arguments.options.keys() - known):
        raise QVLMError(
            f"unknown model argument {unknown[0]!r}; allowed are {', '.join(written_arguments())}; "
            f"and for method={arguments.method}: {', '.join(known) or 'nothing else'}"
        )
    if arguments.conv is not None:
        prompt_format(arguments.conv)
    if arguments.device_map == "offload":
        raise QVLMError(
            "device_map='offload' works only for searches; write the plan with qvlm search --device_map offload and "
            "evaluate it with plan=DIR"
        )
    if arguments.plan is not None:
        named = [name for name in (*_OF_THE_SEARCH, *arguments.options) if name in values]
        if named:
            raise QVLMError(f"plan=DIR is a finished plan; it cannot be combined with {', '.join(named)}")
    return arguments


def written_arguments() -> dict[str, FieldInfo]:
    """Fields that ``--model_args`` may contain, without options of methods."""
    return {name: field for name, field in ModelArguments.model_fields.items() if not field.exclude}


def check_stored(arguments: ModelArguments, backend: str) -> None:
    """Check that the arguments do not contradict a quantized checkpoint.

    Args:
        arguments: the model's arguments.
        backend: the checkpoint's backend.

    Raises:
        QVLMError: an argument concerns quantization, or names another arithmetic.
    """
    fixed = {"scheme", "plan", "calibration", "images", *arguments.options}
    named = sorted(arguments.model_fields_set & fixed)
    if arguments.method != "none":
        named = ["method", *named]
    if "backend" in arguments.model_fields_set and arguments.backend not in ("auto", "packed", backend):
        named.append("backend")
    if named:
        raise QVLMError(
            f"pretrained={arguments.pretrained!r} is a quantized checkpoint (backend={backend}); it cannot be combined "
            f"with {', '.join(named)}"
        )


def _explain(problem: Mapping[str, Any]) -> str:
    name, value = ".".join(map(str, problem["loc"])), problem["input"]
    description = ModelArguments.model_fields[name].description
    if problem["type"] == "missing":
        return f"{name}= is missing: {description}"
    if problem["type"] in ("string_type", "path_type") and isinstance(value, int | float):
        return (
            f"{name}={value!r}: lmms-eval reads this value as a number; it must be text ({description}); "
            "write a folder as ./NAME and a revision as its full commit hash"
        )
    return f"{name}={value!r}: {problem['msg'].lower()} ({description})"
