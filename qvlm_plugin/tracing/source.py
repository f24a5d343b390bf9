"""A topology as Python source: a module that another package can register as its plugin."""

from collections.abc import Iterable

from transformers import PreTrainedModel

from qvlm_plugin.topology import ORDER, Group, Stack, Topology, kept_linears, linear_layers, resolve

_LINE = 107
"""Characters of a group that fit into a line of 120."""

_MODULE = """\
from qvlm_plugin.hooks import hookimpl
from qvlm_plugin.topology import Group, Stack, Topology

{comment}TOPOLOGY = Topology(
{parts}
)


@hookimpl
def qvlm_topology(config):
    return TOPOLOGY if config.model_type == "{model_type}" else None
"""


def python_source(topology: Topology, model: PreTrainedModel) -> str:
    """The source code of a module that describes the family of ``model``.

    Raises:
        QVLMError: see `resolve`.
    """
    sites = resolve(topology, model)
    quantized = {name for site in sites for name in site.linears}
    linears = linear_layers(model)
    described = quantized | kept_linears(topology, model)
    rest = _outermost([name for name in linears if name not in described], linears)
    parts = (
        f"    {part}_path={_names(topology.paths(part))},\n    {part}={_stack(getattr(topology, part))},"
        for part in ORDER
    )
    comment = f"# Outside of the parts, in the compute type: {', '.join(rest)}\n" if rest else ""
    return _MODULE.format(comment=comment, parts="\n".join(parts), model_type=model.config.model_type)


def _stack(stack: Stack) -> str:
    groups = "".join(f"            {_group(group)},\n" for group in stack.groups)
    kept = f"        kept={_tuple(stack.kept)},\n" if stack.kept else ""
    depth = f"        depth={stack.depth},\n" if stack.depth else ""
    if not groups + kept + depth:
        return f'Stack("{stack.blocks}", ())'
    return f'Stack(\n        "{stack.blocks}",\n        (\n{groups}        ),\n{kept}{depth}    )'


def _group(group: Group) -> str:
    arguments = [_tuple(group.linears)]
    if group.producer:
        arguments.append(f"producer={_quoted(group.producer)}")
    line = f"Group({', '.join(arguments)})"
    if len(line) <= _LINE:
        return line
    return "\n".join(["Group(", *(f"{16 * ' '}{argument}," for argument in arguments), f"{12 * ' '})"])


def _names(paths: tuple[str, ...]) -> str:
    return _quoted(paths[0]) if len(paths) == 1 else _tuple(paths)


def _tuple(names: tuple[str, ...]) -> str:
    return f"({', '.join(map(_quoted, names))}{',' if len(names) == 1 else ''})"


def _quoted(name: str) -> str:
    return f'"{name}"'


def _outermost(names: Iterable[str], every: Iterable[str]) -> list[str]:
    """The outermost modules all of whose Linears are among ``names``."""
    others = set(every) - set(names)
    return list(dict.fromkeys(_first_apart(name, others) for name in names))


def _first_apart(name: str, others: set[str]) -> str:
    steps = name.split(".")
    paths = (".".join(steps[:length]) for length in range(1, len(steps) + 1))
    return next(path for path in paths if not any(other.startswith(f"{path}.") for other in others))
