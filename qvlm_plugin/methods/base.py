"""Quantization methods: a preset of options, and steps that the options switch on. Does not import torch."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, create_model

from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.scheme import PARTS, UNQUANTIZED, Scheme

if TYPE_CHECKING:
    from qvlm_plugin.methods.context import SearchContext
    from qvlm_plugin.methods.draft import Draft


@dataclass(frozen=True)
class Step:
    """One step of a method: it searches scales, ranges or codes and adds them to the draft of the plan.

    Attributes:
        name: name in messages.
        run: (context, draft) → draft. It must leave the model unchanged.
        wanted: whether the scheme and the options select it.
        check: raises a `QVLMError` if the context lacks something (answers, for example); called before any step runs.
        needs_calibration: whether it reads calibration data; may depend on the scheme and the options.
        splits: whether fewer samples at a time need less memory (`Footprint.rows`).
    """

    name: str
    run: "Callable[[SearchContext, Draft], Draft]"
    wanted: Callable[[Scheme, Any], bool]
    check: "Callable[[SearchContext], None] | None" = None
    needs_calibration: bool | Callable[[Scheme, Any], bool] = True
    splits: bool = False

    def reads_calibration(self, scheme: Scheme, options: BaseModel) -> bool:
        """``needs_calibration`` for a scheme and options."""
        needs = self.needs_calibration
        return needs(scheme, options) if callable(needs) else needs


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Attributes:
        name: the value of ``method=``.
        summary: one line for help texts.
        options: pydantic model of its options, whose defaults are the preset; unknown options are errors.
        steps: in order; those that scheme and options do not select are skipped. A method without steps leaves the
            model in full precision.
    """

    name: str
    summary: str
    options: type[BaseModel]
    steps: tuple[Step, ...]

    def chosen(self, scheme: Scheme, options: BaseModel) -> tuple[Step, ...]:
        """The steps that the scheme and the options select."""
        return tuple(step for step in self.steps if step.wanted(scheme, options))

    def preset(self) -> tuple[dict[str, Any], list[str]]:
        """The defaults that differ from those of `MethodOptions`, and names of options that only this method has."""
        shared, own = MethodOptions.model_fields, self.options.model_fields
        differing = {
            name: own[name].default for name in own if name in shared and own[name].default != shared[name].default
        }
        return differing, [name for name in own if name not in shared]

    def needs_calibration(self, scheme: Scheme, options: BaseModel) -> bool:
        """Whether any selected step reads calibration data."""
        return any(step.reads_calibration(scheme, options) for step in self.chosen(scheme, options))


def option_text(value: Any) -> str:
    """The value of an option as written in ``--model_args``."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def preset(options: type[BaseModel], **defaults: Any) -> type[BaseModel]:
    """The same options with other defaults."""
    fields = {}
    for name, value in defaults.items():
        field = copy(options.model_fields[name])
        field.default = value
        fields[name] = (field.annotation, field)
    return create_model(options.__name__, __base__=options, __doc__=options.__doc__, __module__=__name__, **fields)


def imported(name: str) -> Callable[..., Any]:
    """The function ``module:function``, imported when it is called, so that steps can be listed without torch."""

    def call(*arguments: Any) -> Any:
        return resolve_name(name)(*arguments)

    call.__module__ = name.partition(":")[0]  # the module whose source is part of a cached plan's key
    return call


def quantizes_weights(scheme: Scheme) -> bool:
    """Whether any part's weights are rounded."""
    return any(getattr(scheme, part).weight != UNQUANTIZED for part in PARTS)


def quantizes_activations(scheme: Scheme) -> bool:
    """Whether any part's activations are rounded."""
    return any(getattr(scheme, part).activation != UNQUANTIZED for part in PARTS)
