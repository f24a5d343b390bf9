"""The Linears of one block: which of them read the same tensor, and which are routers of experts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from transformers import PreTrainedModel

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.topology import linear_layers
from qvlm_plugin.tracing.runs import Run

BY_HAND = "describe the family by hand (docs/add-a-family.md)"


@dataclass(frozen=True, eq=False)
class RecordedModel:
    """A model without weights, and runs of it.

    Attributes:
        model: see `skeleton`.
        runs: runs of prompts; the first has an image.
        source: the model's name in messages.
    """

    model: PreTrainedModel
    runs: tuple[Run, ...]
    source: str


@dataclass(frozen=True)
class Block:
    """The Linears of one block, by their names within it.

    Attributes:
        experts: paths of its lists of experts.
        sites: Linears that read the same tensor, in the order of their calls, by their names in a `Group`. For experts,
            whose names in a group have a ``*``, these are the Linears of one expert.
        kept: routers: Linears next to a list of experts, with one output for each expert.
    """

    experts: tuple[str, ...]
    sites: dict[tuple[str, ...], tuple[str, ...]]
    kept: tuple[str, ...]

    def of_any_expert(self, name: str) -> str:
        """The name with ``*`` in place of an expert's index."""
        return _of_any_expert(name, self.experts)


def inspect_block(recorded: RecordedModel, name: str) -> Block:
    """The Linears of the block with this full name.

    Raises:
        QVLMError: the block or one of its Linears is never called, or two Linears read the same tensor on some
            prompts only.
    """
    if not any(name in run.order for run in recorded.runs):
        raise QVLMError(f"{recorded.source}: {name} is never called; such a model is not supported")
    linears = linear_layers(recorded.model.get_submodule(name))
    routed = {child for run in recorded.runs for child in run.routed if child.startswith(f"{name}.")}
    experts = sorted({child.removeprefix(f"{name}.").rpartition(".")[0] for child in routed})
    widths = {path.rpartition(".")[0]: len(recorded.model.get_submodule(f"{name}.{path}")) for path in experts}
    kept = [child for child, linear in linears.items() if widths.get(child.rpartition(".")[0]) == linear.out_features]
    reads = {
        child: tuple(run.reads.get(f"{name}.{child}") for run in recorded.runs) for child in linears.keys() - set(kept)
    }
    order = {child: tuple(run.order.get(f"{name}.{child}", len(run.order)) for run in recorded.runs) for child in reads}
    together: dict[tuple[tuple[int, ...] | None, ...], list[str]] = {}
    for child in sorted(reads, key=order.__getitem__):
        if any(reads[child]):
            together.setdefault(reads[child], []).append(child)
    sites: dict[tuple[str, ...], tuple[str, ...]] = {}
    for sharing in together.values():
        sites.setdefault(tuple(_of_any_expert(child, experts) for child in sharing), tuple(sharing))
    reached = {child for group in sites for child in group}
    for child in linears.keys() - set(kept):
        if _of_any_expert(child, experts) not in reached:
            raise QVLMError(
                f"{recorded.source}: {name}.{child} is reached by no prompt, with or without images, so its input "
                f"is not known; {BY_HAND}, and list it among the kept Linears"
            )
    _require_consistent(recorded, name, reads)
    return Block(tuple(experts), sites, tuple(kept))


def _of_any_expert(name: str, experts: Iterable[str]) -> str:
    for path in experts:
        if name.startswith(f"{path}."):
            _, _, rest = name.removeprefix(f"{path}.").partition(".")
            return f"{path}.*.{rest}"
    return name


def _require_consistent(recorded: RecordedModel, name: str, reads: dict[str, Sequence[tuple[int, ...] | None]]) -> None:
    """Check that Linears which read the same tensor on one prompt do so on every prompt that reaches both."""
    for one, other in combinations(sorted(reads), 2):
        equal = {a == b for a, b in zip(reads[one], reads[other], strict=True) if a and b}
        if len(equal) > 1:
            raise QVLMError(
                f"{recorded.source}: {one} and {other} of {name} read the same tensor for some prompts and different "
                f"ones for others; {BY_HAND}, and give each its own group"
            )
