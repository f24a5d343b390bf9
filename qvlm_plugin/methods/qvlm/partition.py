"""Partition of the decoder into blocks of strongly dependent layers (Eq. 7)."""

from collections.abc import Sequence

from qvlm_plugin.methods.qvlm.dependency import dependency_between


def partition(dependencies: Sequence[float], threshold: float, max_depth: int) -> tuple[range, ...]:
    """Blocks of consecutive layers, bottom to top, that cover every layer exactly once.

    A block that begins at layer r is extended by layer s while D(r, s) > (s - r) * h0, that is, while the average
    dependency of its steps exceeds the threshold, and while it has fewer than ``max_depth`` layers (paper: 3).

    Args:
        dependencies: D(k, k+1) of the n - 1 pairs of consecutive layers (Eq. 4).
        threshold: h0.
        max_depth: maximum number of layers in a block, at least 1; 1 gives the layer-wise search.
    """
    layers = len(dependencies) + 1
    blocks, start = [], 0
    while start < layers:
        end = start + 1
        while (
            end < layers
            and end - start < max_depth
            and dependency_between(dependencies, start, end) > (end - start) * threshold
        ):
            end += 1
        blocks.append(range(start, end))
        start = end
    return tuple(blocks)
