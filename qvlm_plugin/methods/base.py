"""What a quantization method is: a preset of options, and steps that the options switch on. It takes no torch."""

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
    """One independent choice of a method, carried out: scales, ranges, a joint search.

    Attributes:
        name: for people, and for what an interrupted search keeps.
        run: (context, the plan so far) → the plan so far. It must leave the model unchanged.
        wanted: whether the scheme and the options ask for it.
        check: what it needs of the context (answers, for example), to raise a `QVLMError` before any step runs.
        needs_calibration: whether it looks at calibration data.
        splits: whether fewer samples at a time need less memory (`Footprint.rows`).
    """

    name: str
    run: "Callable[[SearchContext, Draft], Draft]"
    wanted: Callable[[Scheme, Any], bool]
    check: "Callable[[SearchContext], None] | None" = None
    needs_calibration: bool = True
    splits: bool = False


@dataclass(frozen=True)
class Method:
    """A way to quantize.

    Attributes:
        name: as ``method=`` names it.
        summary: one line for help texts.
        options: pydantic model of its options, whose defaults are the preset; unknown ones are errors.
        steps: in order; a method without steps leaves the model in full precision. Those that the options do not want
            are left out.
    """

    name: str
    summary: str
    options: type[BaseModel]
    steps: tuple[Step, ...]

    def chosen(self, scheme: Scheme, options: BaseModel) -> tuple[Step, ...]:
        """The steps that the scheme and the options want."""
        return tuple(step for step in self.steps if step.wanted(scheme, options))

    def preset(self) -> tuple[dict[str, Any], list[str]]:
        """Its defaults that differ from those of `MethodOptions`, and names of options that only this method has."""
        shared, own = MethodOptions.model_fields, self.options.model_fields
        differing = {
            name: own[name].default for name in own if name in shared and own[name].default != shared[name].default
        }
        return differing, [name for name in own if name not in shared]

    def needs_calibration(self, scheme: Scheme, options: BaseModel) -> bool:
        """Whether any of these looks at calibration data."""
        return any(step.needs_calibration for step in self.chosen(scheme, options))


def shown(value: Any) -> str:
    """A value of an option, as it is written in ``--model_args``."""
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
    """The function that ``module:function`` names, imported when it is called; for steps that are to be listed without
    importing what they compute with.
    """

    def call(*arguments: Any) -> Any:
        return resolve_name(name)(*arguments)

    call.__module__ = name.partition(":")[0]  # where the code is that decides a cached plan
    return call


def quantizes_weights(scheme: Scheme) -> bool:
    """Whether any part's weights are rounded."""
    return any(getattr(scheme, part).weight != UNQUANTIZED for part in PARTS)


def quantizes_activations(scheme: Scheme) -> bool:
    """Whether any part's activations are rounded."""
    return any(getattr(scheme, part).activation != UNQUANTIZED for part in PARTS)
