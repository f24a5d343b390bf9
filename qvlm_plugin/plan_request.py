"""The request of a search - a method with its options, and a scheme - checked before any weight is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from qvlm_plugin import plugins
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.base import Method
from qvlm_plugin.scheme import Scheme

if TYPE_CHECKING:
    from qvlm_plugin.calibration import CalibrationSet


@dataclass(frozen=True)
class PlanRequest:
    """A method with its options, and a scheme; created by `check_request`."""

    method: Method
    scheme: Scheme
    options: BaseModel

    @property
    def needs_calibration(self) -> bool:
        """Whether the search needs a calibration set."""
        return self.method.needs_calibration(self.scheme, self.options)

    @property
    def batch_size(self) -> int:
        """Calibration samples per forward pass: the option ``calibration_batch_size``; 1 if the method has none."""
        return getattr(self.options, "calibration_batch_size", 1)


def check_request(method: str, scheme: str, options: Mapping[str, Any]) -> PlanRequest:
    """Validate the names and values of a request.

    Raises:
        QVLMError: the method or an option is unknown, or a value is not allowed.
    """
    known = plugins.method(method)
    parsed = Scheme.parse(scheme)
    allowed = ", ".join(known.options.model_fields) or "none"
    if unknown := sorted(options.keys() - known.options.model_fields.keys()):
        raise QVLMError(f"unknown argument {unknown[0]!r}; method={method} takes these options: {allowed}")
    try:
        return PlanRequest(known, parsed, known.options.model_validate(dict(options)))
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]}={first['input']!r} is not allowed for " if first["loc"] else ""
        raise QVLMError(f"{where}method={method}: {first['msg'].removeprefix('Value error, ')}") from error


def check_calibration(request: PlanRequest, calibration: "CalibrationSet | None") -> None:
    """Check that a request has the calibration data that it needs, without a model.

    Raises:
        QVLMError: there are none, or fewer samples than a batch.
    """
    if not request.needs_calibration:
        return
    if calibration is None:
        raise QVLMError(f"method={request.method.name} with scheme={request.scheme} needs calibration data")
    count, batch_size = len(calibration.samples), request.batch_size
    if count < batch_size:
        raise QVLMError(
            f"calibration={calibration.source!r} has {count} samples, fewer than calibration_batch_size={batch_size}; "
            f"draw at least {batch_size} samples, or set calibration_batch_size to at most {count}"
        )
