"""What a plan says beside its tensors: the content of ``plan.json``. Reading it takes no torch."""

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
"""The newest that this version reads. 2 had stored integer codes, 3 has codes of either kind, rotations, centered
activations and weights that are clipped by magnitude. Plans without any are written as 1: older versions read and apply
them as this one does."""

HEADER, TENSORS = "plan.json", "plan.safetensors"
"""The files of a plan's folder."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModulePlan(_Record):
    """What becomes of one Linear.

    Attributes:
        name: full name in the model.
        part: ``vision``, ``projector`` or ``decoder``; ``unused`` for vision blocks that the output does not depend on,
            ``other`` for what is never quantized (the language model's head, routers).
        site: name of the activation quantizer it shares; None when the topology gives it none.
        shape: [out_features, in_features].
        weight, activation: the formats.
    """

    name: str
    part: str
    site: str | None
    shape: tuple[PositiveInt, PositiveInt]
    weight: WeightFormat
    activation: ActivationFormat

    @property
    def is_identity(self) -> bool:
        """Whether the Linear stays as it is."""
        return self.weight.kind == "none" and self.activation.kind == "none"


def table_hash(modules: Sequence[ModulePlan]) -> str:
    """SHA-256 of a per-module table."""
    return digest(json.dumps([module.model_dump() for module in modules], sort_keys=True).encode())


class Fold(_Record):
    """Per-channel scales that move between a module and the Linears that read it, without changing their product.

    The producer's output channels are divided by the plan's tensor ``<site>/scale``, the columns of the site's Linears
    multiplied by it (AWQ's equivalent transformation).

    Attributes:
        site: whose Linears read the producer.
        producer: full name of a norm or Linear.
        head_dim: for a producer with fewer heads than its readers (values under grouped-query attention): the width of
            a head, each of which is read several times in a row; None where channels correspond one to one.
    """

    site: str
    producer: str
    head_dim: int | None = None

    def spread(self, scale: "Tensor", width: int) -> "Tensor":
        """The scale of each of ``width`` channels read: [width], from ``scale`` [channels produced]."""
        if self.head_dim is None:
            return scale
        heads = scale.view(-1, self.head_dim)
        return heads.repeat_interleave(width // scale.numel(), dim=0).flatten()


class Rotation(_Record):
    """An orthogonal matrix R that a site's inputs are multiplied by, before they are rounded, while the model runs.

    Weights of the site's Linears are multiplied by it when the plan is applied, after folds and before they are
    rounded: ``x Wᵀ = (x R) (W R)ᵀ``. Codes, means and clipping in the plan are of what has been multiplied.

    Where it is ``scaled``, inputs are first divided by the plan's tensor ``<site>/scale`` [channels], and weights
    multiplied by it: ``x Wᵀ = (x S⁻¹ R) (W S R)ᵀ``. Unlike a `Fold` that takes no module which produces the inputs.

    Attributes:
        site: whose inputs.
        kind: ``signed`` - R = S (M ⊗ H), see `rotation`.
        outer: order of M.
        block: order of the Hadamard matrix H, a power of two.
        seed: that the signs S are drawn from, and M where it has to be.
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
        """Without ``scaled`` unless it is true, so that plans without scales keep their hashes."""
        return {name: value for name, value in serialize(self).items() if name != "scaled" or value}

    @field_validator("block")
    @classmethod
    def _power_of_two(cls, block: int) -> int:
        if block & (block - 1):
            raise ValueError(f"{block} is not a power of two")
        return block

    @property
    def channels(self) -> int:
        """How many channels it mixes."""
        return self.outer * self.block

    def obstacle(self, module: ModulePlan) -> str | None:
        """Why the inputs of a Linear at the site cannot be rotated, in a few words; None if they can."""
        if self.channels != module.shape[1]:
            return f"it is of {self.channels} channels, and {module.name} has {module.shape[1]}"
        if module.activation.kind == "static_channel":
            return (
                "its ranges are those of single channels (static_channel), and a rotation lets a token with one "
                "massive channel widen them all; it goes with dynamic_token, or inputs that are not rounded"
            )
        return None

    def __str__(self) -> str:
        return f"{'scaled and ' if self.scaled else ''}rotated {self.outer}x{self.block}"


class CalibrationRecord(_Record):
    """What a plan was fitted on.

    Attributes:
        source, seed: where documents were drawn from, and how.
        digests: of the documents.
        conv: the prompt format (`LoadedModel.conv`); None in plans that are older than this field.
        over_context: samples with more tokens than `LoadedModel.context`; None where that was not counted.
    """

    source: str
    seed: int
    digests: tuple[str, ...]
    conv: str | None = None
    over_context: int | None = None


class PlanFacts:
    """What follows from what a plan says; of a `PlanHeader` and a `RoundingPlan` alike, whose attributes it reads."""

    @property
    def hash(self) -> str:
        """SHA-256 of what the plan does: model, modules and tensors; not of how long it took or where it lies."""
        edits: list[Any] = [[fold.model_dump() for fold in self.folds], self.replaced]
        if self.rotations:  # hashes of plans without any are those of older versions
            edits.append([rotation.model_dump() for rotation in self.rotations])
        parts = (self.model, self.table_hash, json.dumps(edits), self.tensors_sha256)
        return digest("|".join(parts).encode())

    @property
    def table_hash(self) -> str:
        """SHA-256 of the per-module table alone."""
        return table_hash(self.modules)

    @property
    def quantized(self) -> tuple[ModulePlan, ...]:
        """The modules that do not stay as they are."""
        return tuple(
            module for module in self.modules if not module.is_identity or self.rotation_of(module) is not None
        )

    @property
    def oldest_format(self) -> int:
        """The oldest `FORMAT_VERSION` that can say what the plan does."""
        newer = any(
            module.weight.stored
            or module.weight.clip_magnitude
            or module.weight.progressive
            or module.activation.centered
            for module in self.modules
        )
        return FORMAT_VERSION if self.rotations or newer else 1

    @property
    def facts(self) -> dict[str, Any]:
        """What results state of the plan: JSON data."""
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
        """What a Linear's inputs are multiplied by; None if by nothing."""
        return self._rotation_at.get(module.site)

    @cached_property
    def _rotation_at(self) -> dict[str | None, Rotation]:
        return {rotation.site: rotation for rotation in self.rotations}

    def effective_bits(self) -> dict[str, dict[str, float]]:
        """Mean bits of each part's weights (scales and zero points included) and input elements, by weight count."""
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
    """The content of ``plan.json``: the attributes of a `RoundingPlan`, with its tensors' file by its SHA-256."""

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
        """Without ``rotations`` if there are none: older versions know no such key."""
        content = serialize(self)
        return {name: value for name, value in content.items() if name != "rotations" or value}


def read_header(directory: Path | str) -> PlanHeader:
    """Read what a plan's folder says, and check that it is whole.

    Raises:
        QVLMError: it is missing, incomplete, altered, or written by a newer version.
    """
    directory = Path(directory)
    header_file, tensor_file = directory / HEADER, directory / TENSORS
    for file in (header_file, tensor_file):
        if not file.is_file():
            raise QVLMError(f"plan={str(directory)!r}: {file.name} is missing; a plan folder has it")
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
