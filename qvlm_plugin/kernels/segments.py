"""Segments of input channels that share a weight scale, for channels whose steps differ by orders of magnitude."""

import torch
from torch import Tensor


def segment_widths(step: Tensor, count: int, multiple: int) -> tuple[int, ...]:
    """Split channels sorted by step so that rounding a folded weight causes the least error.

    Within a segment, every weight's rounding error is proportional to the segment's largest step. So the squared error
    of an output is proportional to the number of channels times the largest step squared, summed over segments. This is
    minimised exactly, by dynamic programming over the possible borders.

    Args:
        step: steps of the channels, ascending [I].
        count: maximum number of segments.
        multiple: borders are at multiples of this number.

    Returns:
        The number of channels in each segment, at least 1; the numbers sum to I.
    """
    columns = len(step)
    borders = [*range(0, columns, multiple), columns]
    ends = torch.tensor(borders)
    largest = step.detach().double().cpu()[ends[1:] - 1].square()
    # cost[i, j] is the cost of a segment from border i to border j + 1.
    cost = ((ends[None, 1:] - ends[:-1, None]) * largest).masked_fill(ends[None, 1:] <= ends[:-1, None], torch.inf)
    best, previous = cost[0], []
    for _ in range(count - 1):
        total, start = torch.cat([cost[:1], best[:-1, None] + cost[1:]]).min(dim=0)
        previous.append(start)
        best = total
    widths, end = [], len(borders) - 2
    for start in (*reversed(previous), torch.zeros(len(borders) - 1, dtype=torch.int64)):
        first = int(start[end])
        widths.append(borders[end + 1] - borders[first])
        if first == 0:
            break
        end = first - 1
    return tuple(reversed(widths))
