"""``qvlm arguments``: the reference of all arguments and options, written from the code that reads them."""

import inspect
import re
import types
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from qvlm_plugin.methods.base import shown
from qvlm_plugin.methods.options import MethodOptions

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from qvlm_plugin.methods.base import Method

_PAGE = """\
# Arguments

Written by `qvlm arguments`, which also lists what installed plugins add. `true` and `false` are written like this, and
`none` where nothing is meant.

## Model arguments

Of `lmms-eval --model qvlm --model_args NAME=VALUE,…`. Any other name is an option of the method.

{arguments}

## Options of methods

A method is a preset of these options. Any method takes any of them, so that two runs can differ in a single choice.

{options}

## Methods

{methods}

## Commands

{commands}"""


def arguments(context: typer.Context) -> None:
    """Print the reference of model arguments, options of methods, and commands, as Markdown.

    Example: qvlm arguments > docs/arguments.md
    """
    from qvlm_plugin import plugins
    from qvlm_plugin.harness.arguments import ModelArguments

    page = reference(ModelArguments, plugins.methods(), context.find_root().command)
    typer.echo(page, nl=False)


def reference(arguments: "type[BaseModel]", methods: "Mapping[str, Method]", command: TyperGroup) -> str:
    """The page.

    Args:
        arguments: of the model.
        methods: by name.
        command: of the command line, with its sub-commands.
    """
    return _PAGE.format(
        arguments=_options_table(arguments),
        options=_options_table(MethodOptions),
        methods="\n\n".join(_of_method(method) for _, method in sorted(methods.items())),
        commands="\n".join(_of_commands(command, "qvlm")),
    )


def _of_method(method: "Method") -> str:
    text = f"### {method.name}\n\n{method.summary[0].upper()}{method.summary[1:]}."
    if not method.options.model_fields:
        return f"{text} No options."
    preset, own = method.preset()
    if preset:
        text += f" Its defaults: {', '.join(f'`{name}={shown(value)}`' for name, value in preset.items())}."
    return f"{text}\n\n{_options_table(method.options, own)}" if own else text


def _options_table(options: "type[BaseModel]", names: Collection[str] | None = None) -> str:
    described = _attributes(options)
    rows = [
        (f"`{name}`", _values(field), _default(field), field.description or described.get(name, ""))
        for name, field in options.model_fields.items()
        if not field.exclude and (names is None or name in names)
    ]
    return _table(("name", "values", "default", "meaning"), rows)


def _attributes(options: type) -> dict[str, str]:
    """What the docstrings of a class and of those that it extends say about attributes, by name."""
    described: dict[str, str] = {}
    for class_ in reversed(options.__mro__):
        _, _, section = (inspect.cleandoc(class_.__doc__ or "")).partition("Attributes:\n")
        for names, text in re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            meaning = " ".join(text.split()).replace("``", "`").removesuffix(".")
            described |= dict.fromkeys(names.split(", "), meaning)
    return described


def _values(field: "FieldInfo") -> str:
    """What a field takes: words, or a kind of number and its bounds."""
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(one for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [
        f"{sign} {getattr(bound, key)}"
        for bound in field.metadata
        for key, sign in signs.items()
        if hasattr(bound, key)
    ]
    name = {int: "whole number", float: "number", str: "text"}.get(kind, "folder")
    return " ".join([name, " and ".join(bounds)]).strip()


def _default(field: "FieldInfo") -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return ""
    if field.default is None:
        return "–"
    return f"`{shown(field.default)}`"


def _of_commands(command: TyperCommand | TyperGroup, path: str) -> Iterator[str]:
    if isinstance(command, TyperGroup):
        for name in sorted(command.commands):
            yield from _of_commands(command.commands[name], f"{path} {name}")
        return
    positional = [parameter for parameter in command.params if isinstance(parameter, TyperArgument)]
    options = [parameter for parameter in command.params if isinstance(parameter, TyperOption)]
    usage = " ".join([path, *map(_usage_of, positional)])
    summary, _, example = " ".join((command.help or "").split()).partition(" Example: ")
    yield f"### {usage}\n\n{summary}\n"
    if example:
        yield f"```bash\n{example}\n```\n"
    rows = [(f"`{max(option.opts, key=len)}`", _of_option(option), option.help or "") for option in options]
    if rows:
        yield _table(("option", "default", "meaning"), rows) + "\n"


def _usage_of(argument: TyperArgument) -> str:
    name = argument.name.upper() + ("…" if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _of_option(option: TyperOption) -> str:
    if option.required:
        return "required"
    unset = option.default is None or option.default is False or option.default in ("", [], ())
    return "" if unset else f"`{option.default}`"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
