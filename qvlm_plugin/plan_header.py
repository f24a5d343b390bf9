"""A plan without its tensors: the content of ``plan.json``. Reading it does not import torch."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.reading import one_line, read_json
from qvlm_plugin.scheme import PARTS

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 3
"""The newest format that this version reads. 2 had stored integer codes; 3 has stored codes of both kinds, rotations,
centered and normal activations, progressive scales and weights clipped by magnitude. Plans without any of these are
written as 1, which older versions read and apply in the same way."""

HEADER, TENSORS = "plan.json", "plan.safetensors"
"""The files of a plan's folder."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModulePlan(_Record):
    """How a plan quantizes one Linear.

    Attributes:
        name: full name in the model.
        part: ``vision``, ``projector`` or ``decoder``; ``unused`` for vision blocks that do not affect the output,
            ``other`` for Linears that are never quantized (the language model's head, routers).
        site: name of the activation quantizer of its input; None if the topology has none.
        shape: [out_features, in_features].
        weight, activation: the formats of its weight and its input.
    """

    name: str
    part: str
    site: str | None
    shape: tuple[PositiveInt, PositiveInt]
    weight: WeightFormat
    activation: ActivationFormat

    @property
    def is_identity(self) -> bool:
        """Whether neither weight nor input is quantized."""
        return self.weight.kind == "none" and self.activation.kind == "none"


def table_hash(modules: Sequence[ModulePlan]) -> str:
    """SHA-256 of a per-module table."""
    return digest(json.dumps([module.model_dump() for module in modules], sort_keys=True).encode())


class Fold(_Record):
    """Per-channel scales that move from a module into the Linears that read it, which leaves their outputs unchanged.

    The producer's output channels are divided by the plan's tensor ``<site>/scale``, and the columns of the site's
    Linears are multiplied by it (AWQ's equivalent transformation).

    Attributes:
        site: the site whose Linears read the producer.
        producer: full name of a norm or Linear.
        head_dim: for a producer with fewer heads than its readers (values under grouped-query attention, where
            consecutive query heads share a head): the width of a head; None if channels correspond one to one.
    """

    site: str
    producer: str
    head_dim: int | None = None

    def spread(self, scale: "Tensor", width: int) -> "Tensor":
        """The scale of each input channel of the readers: [width], from ``scale`` [channels produced]."""
        if self.head_dim is None:
            return scale
        heads = scale.view(-1, self.head_dim)
        return heads.repeat_interleave(width // scale.numel(), dim=0).flatten()


class Rotation(_Record):
    """An orthogonal matrix R by which a site's inputs are multiplied at run time, before they are rounded.

    Applying the plan multiplies the weights of the site's Linears by it, after folds and before they are rounded:
    ``x Wᵀ = (x R) (W R)ᵀ``. Codes, means and clipping factors in the plan refer to the rotated tensors.

    If it is ``scaled``, inputs are first divided by the plan's tensor ``<site>/scale`` [channels], and weights
    multiplied by it: ``x Wᵀ = (x S⁻¹ R) (W S R)ᵀ``. Unlike a `Fold`, this needs no module that produces the inputs.

    Attributes:
        site: the site whose inputs are rotated.
        kind: ``signed`` - R = S (M ⊗ H), see `rotation`.
        outer: order of M.
        block: order of the Hadamard matrix H, a power of two.
        seed: seed of the signs S, and of M if it is random.
        scaled: whether inputs are divided by a scale first.
    """

    site: str
    kind: Literal["signed"] = "signed"
    outer: PositiveInt
    block: PositiveInt
    seed: int = Field(0, ge=0, lt=2**63)
    scaled: bool = False

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out ``scaled`` if it is false, so that plans without scales keep their hashes."""
        return {name: value for name, value in serialize(self).items() if name != "scaled" or value}

    @field_validator("block")
    @classmethod
    def _power_of_two(cls, block: int) -> int:
        if block & (block - 1):
            raise ValueError(f"{block} is not a power of two")
        return block

    @property
    def channels(self) -> int:
        """The number of channels that it mixes."""
        return self.outer * self.block

    def obstacle(self, module: ModulePlan) -> str | None:
        """Why the inputs of a Linear at the site cannot be rotated, in a few words; None if they can."""
        if self.channels != module.shape[1]:
            return f"it is of {self.channels} channels, and {module.name} has {module.shape[1]}"
        if module.activation.kind == "static_channel":
            return (
                "its activations have static ranges per channel (static_channel), and after a rotation one massive "
                "channel of a token widens them all; use dynamic_token, or leave the inputs unquantized"
            )
        return None

    def __str__(self) -> str:
        return f"{'scaled and ' if self.scaled else ''}rotated {self.outer}x{self.block}"


class CalibrationRecord(_Record):
    """The calibration data of a plan.

    Attributes:
        source, seed: the source of the documents, and the seed of their draw.
        digests: digests of the documents.
        conv: the prompt format (`LoadedModel.conv`); None in plans that are older than this field.
        over_context: number of samples with more tokens than `LoadedModel.context`; None if it was not counted.
    """

    source: str
    seed: int
    digests: tuple[str, ...]
    conv: str | None = None
    over_context: int | None = None


class PlanFacts:
    """Properties derived from a plan's attributes; `PlanHeader` and `RoundingPlan` inherit them."""

    @property
    def hash(self) -> str:
        """SHA-256 of all that determines the quantized model: model, modules, edits and tensors; not search times."""
        edits: list[Any] = [[fold.model_dump() for fold in self.folds], self.replaced]
        if self.rotations:  # plans without any keep the hashes of older versions
            edits.append([rotation.model_dump() for rotation in self.rotations])
        parts = (self.model, self.table_hash, json.dumps(edits), self.tensors_sha256)
        return digest("|".join(parts).encode())

    @property
    def table_hash(self) -> str:
        """SHA-256 of the per-module table alone."""
        return table_hash(self.modules)

    @property
    def quantized(self) -> tuple[ModulePlan, ...]:
        """The modules that are quantized, or whose inputs are rotated."""
        return tuple(
            module for module in self.modules if not module.is_identity or self.rotation_of(module) is not None
        )

    @property
    def oldest_format(self) -> int:
        """The oldest `FORMAT_VERSION` that can represent the plan."""
        newer = any(
            module.weight.stored
            or module.weight.clip_magnitude
            or module.weight.progressive
            or module.activation.centered
            or module.activation.normal
            for module in self.modules
        )
        return FORMAT_VERSION if self.rotations or newer else 1

    @property
    def facts(self) -> dict[str, Any]:
        """The facts about the plan that results files state: JSON data."""
        return {
            "method": self.method,
            "scheme": self.scheme,
            "options": dict(self.options),
            "bits": self.effective_bits(),
            "table_hash": self.table_hash,
            "plan_hash": self.hash,
            "calibration": self.calibration
            and {
                "source": self.calibration.source,
                "seed": self.calibration.seed,
                "documents": len(self.calibration.digests),
                "conv": self.calibration.conv,
                "over_context": self.calibration.over_context,
            },
            "uncalibrated_expert_inputs": len(self.record.get("uncalibrated", ())),
            "search_seconds": self.search_seconds,
        }

    def readers(self, site: str) -> tuple[str, ...]:
        """Names of the Linears at a site."""
        return tuple(module.name for module in self.modules if module.site == site)

    def rotation_of(self, module: ModulePlan) -> Rotation | None:
        """The rotation of a Linear's inputs; None if there is none."""
        return self._rotation_at.get(module.site)

    @cached_property
    def _rotation_at(self) -> dict[str | None, Rotation]:
        return {rotation.site: rotation for rotation in self.rotations}

    def effective_bits(self) -> dict[str, dict[str, float]]:
        """Mean bits of each part's weights (scales and zero points included) and activations.

        Both means weight each Linear by the number of its weights.
        """
        table = {}
        for part in (*PARTS, "unused", "other"):
            modules = [module for module in self.modules if module.part == part]
            elements = sum(module.shape[0] * module.shape[1] for module in modules)
            if elements:
                table[part] = {
                    "weight": sum(m.weight.effective_bits(m.shape) * m.shape[0] * m.shape[1] for m in modules)
                    / elements,
                    "activation": sum(m.activation.bits * m.shape[0] * m.shape[1] for m in modules) / elements,
                }
        return table


class PlanHeader(PlanFacts, _Record):
    """The content of ``plan.json``: the attributes of a `RoundingPlan`, with the SHA-256 of its tensors' file."""

    format: Literal["qvlm-rounding-plan"] = "qvlm-rounding-plan"
    format_version: int
    package_version: str
    method: str
    scheme: str
    options: dict[str, Any]
    model: str
    calibration: CalibrationRecord | None
    search_seconds: float
    tensors_sha256: str
    modules: tuple[ModulePlan, ...]
    folds: tuple[Fold, ...]
    replaced: tuple[str, ...]
    rotations: tuple[Rotation, ...] = ()
    record: dict[str, Any] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out ``rotations`` if there are none: older versions refuse that key."""
        content = serialize(self)
        return {name: value for name, value in content.items() if name != "rotations" or value}


def read_header(directory: Path | str) -> PlanHeader:
    """Read the header of a plan's folder, and check the files against it.

    Raises:
        QVLMError: a file is missing, incomplete, altered, or written by a newer version.
    """
    directory = Path(directory)
    header_file, tensor_file = directory / HEADER, directory / TENSORS
    for file in (header_file, tensor_file):
        if not file.is_file():
            raise QVLMError(f"plan={str(directory)!r}: {file.name} is missing; every plan folder contains it")
    try:
        raw = read_json(header_file)
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise QVLMError(
                f"plan={str(directory)!r} has format {version}, written by version {raw.get('package_version')}; "
                f"this version reads up to {FORMAT_VERSION}"
            )
        header = PlanHeader.model_validate(raw)
    except (OSError, ValueError) as error:
        if isinstance(error, QVLMError):
            raise
        raise QVLMError(f"plan={str(directory)!r}: {HEADER} is not a plan: {one_line(error)}") from error
    with tensor_file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != header.tensors_sha256:
            raise QVLMError(f"plan={str(directory)!r}: plan.safetensors is truncated or altered (its hash differs)")
    return header


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
