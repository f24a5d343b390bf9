"""Segments of input channels that share a weight scale, for channels whose steps differ by orders of magnitude."""

import torch
from torch import Tensor


def segment_widths(step: Tensor, count: int, multiple: int) -> tuple[int, ...]:
    """Split channels sorted by step so that rounding a folded weight costs least.

    In a segment a weight's rounding error is in proportion to the largest step, whatever the channel's own, and the
    squared error of an output to the sum of their squares: channels times largest step squared, summed over segments.
    That is minimised exactly, by dynamic programming over the possible borders.

    Args:
        step: ascending [I].
        count: segments at most.
        multiple: borders are at multiples of it.

    Returns:
        Channels in each segment, none empty; they sum to I.
    """
    columns = len(step)
    borders = [*range(0, columns, multiple), columns]
    ends = torch.tensor(borders)
    largest = step.detach().double().cpu()[ends[1:] - 1].square()
    # cost[i, j]: of a segment from border i to border j + 1.
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
