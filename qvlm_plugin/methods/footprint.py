"""Limits of a search's memory use. They do not change its results."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Footprint:
    """What a search keeps on the model's device.

    Attributes:
        caches_on_cpu: whether cached hidden states, and tensors saved for a backward pass, are kept on the CPU.
        rows: samples of a batch that go through a decoder layer together if no gradient is taken; None: all of them.
            The method's batch size, which decides padding, sums and gradient steps, does not change.
    """

    caches_on_cpu: bool = False
    rows: int | None = None

    def smaller(self, batch_size: int) -> "Footprint | None":
        """The next smaller footprint for batches of ``batch_size`` samples; None if there is none.

        Caches move first: a copy for each pass through a layer costs little compared with the pass itself.
        """
        if not self.caches_on_cpu:
            return replace(self, caches_on_cpu=True)
        rows = min(self.rows or batch_size, batch_size)
        return replace(self, rows=rows // 2) if rows > 1 else None

    def __str__(self) -> str:
        caches = "caches on the CPU" if self.caches_on_cpu else "caches on the device"
        return caches if self.rows is None else f"{caches}, {self.rows} samples at a time"
