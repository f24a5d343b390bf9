"""Latency of answers: time to the first token, and time per further token."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria


class FirstToken(StoppingCriteria):
    """Records when a batch has its first tokens. Never stops generation.

    Attributes:
        time: `time.perf_counter` at the first tokens, in seconds; None before them.
    """

    def __init__(self) -> None:
        """Start without a time."""
        self.time: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """False for each row of ``input_ids`` [B, T]: bool [B]."""
        if self.time is None:
            if input_ids.is_cuda:
                torch.cuda.synchronize(input_ids.device)
            self.time = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Latency:
    """Latency of the requests of one batch.

    Attributes:
        requests: number of requests.
        first_token: seconds from texts and images to the first token.
        per_token: seconds per further token, the same for all requests; None without further tokens.
    """

    requests: int
    first_token: float
    per_token: float | None

    @classmethod
    def of(cls, requests: int, times: tuple[float, float, float], tokens: int) -> "Latency":
        """The latency of a batch.

        Args:
            requests: number of requests.
            times: seconds at the start, at the first tokens and at the end.
            tokens: tokens of the longest answer.
        """
        start, first, end = times
        return cls(requests, first - start, (end - first) / (tokens - 1) if tokens > 1 else None)


def compiled_graphs() -> int:
    """How many graphs torch.compile has compiled in this process, to leave out requests that waited for it."""
    compiler = sys.modules.get("torch._dynamo.utils")  # importing it takes seconds
    return compiler.counters["stats"]["unique_graphs"] if compiler else 0


def summary(batches: Sequence[Latency]) -> dict[str, Any] | None:
    """Mean, median and 90th percentile over requests, in seconds; None if nothing was generated."""
    if not batches:
        return None
    counts = [batch.requests for batch in batches]
    further = [(batch.per_token, batch.requests) for batch in batches if batch.per_token is not None]
    return {
        "requests": sum(counts),
        "time_to_first_token": _spread([batch.first_token for batch in batches], counts),
        "time_per_output_token": _spread(*zip(*further, strict=True)) if further else None,
    }


def _spread(seconds: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    values = np.repeat(seconds, counts)
    median, high = np.percentile(values, [50, 90])
    return {"mean": float(values.mean()), "median": float(median), "p90": float(high)}
