"""When the first token of a batch's answers is there, beside when all are: what people who serve models ask for."""

import time

import torch
from transformers import LogitsProcessor


class FirstToken(LogitsProcessor):
    """Notes when generation gets its first logits, and changes nothing.

    Attributes:
        seconds: from `start` until the logits of the first new token were computed; None before that.
    """

    def __init__(self, device: torch.device) -> None:
        """Start to measure; work that was given to ``device`` before is waited for."""
        self.seconds: float | None = None
        self.start = now(device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``scores`` [B, V] as they are."""
        if self.seconds is None:
            self.seconds = now(scores.device) - self.start
        return scores


def now(device: torch.device) -> float:
    """Seconds on a clock, read when ``device`` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
