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

_SEARCH_ARGUMENTS = ("method", "scheme", "calibration", "images", "seed", "cache")
"""Arguments that cannot be combined with a saved plan."""


class ModelArguments(BaseModel):
    """The arguments of ``--model qvlm``.

    Excluded fields are not written in ``--model_args``: lmms-eval passes them from its own options.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    pretrained: str = Field(description="checkpoint folder or hub id; 'demo' is the embedded small LLaVA")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: str = Field(
        "auto", description=f"floating-point type of the computation: {', '.join(DTYPES)}; auto: the checkpoint's"
    )
    device: str | None = Field(
        None, description="torch device, such as cpu or cuda:1; default: the accelerator if there is one, else cpu"
    )
    device_map: str | None = Field(None, description="auto spreads the model over all devices; default: one device")
    attn_implementation: str | None = Field(
        None, description="attention kernel: eager, sdpa or flash_attention_2; default: transformers chooses"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the checkpoint")
    conv: str | None = Field(None, description=f"prompt format: {', '.join(PROMPT_FORMATS)}; default: the checkpoint's")
    router_noise_seed: int | None = Field(
        None, ge=0, description="for MoE-LLaVA: add noise with this seed when experts are chosen; default: no noise"
    )
    image_aspect_ratio: str | None = Field(
        None,
        description="for checkpoints in LLaVA's own layout: how images are made square, square or pad; "
        "default: the checkpoint's",
    )
    topology: Literal["described", "traced"] = Field(
        "described",
        description="where the model's parts are listed: described, by a description of its family; "
        "traced, found by running it, for other families",
    )
    method: str = Field("none", description="quantization method, see Methods; none: full precision")
    scheme: str = Field("w4a4", description="bits of weights and activations, such as w4a4 or w4a4+vision:w8a8")
    plan: Path | None = Field(None, description="folder of a saved plan to apply, instead of method and scheme")
    calibration: str | None = Field(
        "scienceqa:train:64",
        description="calibration samples: n of a task's split, task:split:n, or of a file, file.json:n; "
        "join several sources by +",
    )
    images: Path | None = Field(None, description="folder of the images that a calibration file names")
    seed: int = Field(
        0,
        ge=0,
        description="seed of the choice of calibration samples, and of random choices in the search",
    )
    cache: Path | None = Field(
        default_factory=lambda: cache_root() / "plans",
        description="folder that keeps searched plans, so that the same search need not run twice; "
        "default: plans/ in $QVLM_CACHE or ~/.cache/qvlm_plugin; none: keep no plans and always search",
    )
    backend: str = Field(
        "reference",
        description="how quantized layers are computed: reference (simulated in floating point), packed (kernels with "
        "packed weights), auto (as packed, without kernels that fail their self-test), or one kernel's name",
    )
    compile: bool = Field(
        False, description="compile the decoding of tokens: some minutes at the start, then faster; for long runs"
    )
    strict: bool = Field(
        False, description="stop with an error if a Linear has no packed kernel, instead of simulating it"
    )
    allow_overlap: bool = Field(False, description="allow calibration samples that are among the evaluated documents")
    batch_size: int = Field(1, ge=1, exclude=True, description="documents per forward pass")
    max_new_tokens: int = Field(32, ge=1, description="maximum length of an answer in tokens, for tasks that set none")
    system_prompt: str | None = Field(
        None, description="system message to add to every prompt: text, or a file that contains it"
    )

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
        QVLMError: an argument is given twice or must be given as an option, or an option is not supported.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if "max_batch_size" in given:
        raise QVLMError(
            "--max_batch_size is not supported, as the batch size is not searched; write, for example, --batch_size 8"
        )
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
        named = [name for name in (*_SEARCH_ARGUMENTS, *arguments.options) if name in values]
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
        QVLMError: an argument concerns quantization, or names another backend.
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
