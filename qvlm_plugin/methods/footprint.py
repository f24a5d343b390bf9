"""How much memory a search takes at a time. It changes nothing in what is computed."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Footprint:
    """What is kept on the device where the model runs.

    Attributes:
        caches_on_cpu: cached hidden states, and those that a backward pass needs, wait on the CPU.
        rows: samples of a batch that go through a decoder layer together, where no gradient is taken; None: all of
            them. The method's own batch size, which decides padding, sums and gradient steps, stays what it is.
    """

    caches_on_cpu: bool = False
    rows: int | None = None

    def smaller(self, batch_size: int) -> "Footprint | None":
        """The next smaller one for batches of so many samples; None if there is none.

        Caches go first: what they cost on the CPU, a copy for each pass through a layer, is small beside the pass.
        """
        if not self.caches_on_cpu:
            return replace(self, caches_on_cpu=True)
        rows = min(self.rows or batch_size, batch_size)
        return replace(self, rows=rows // 2) if rows > 1 else None

    def __str__(self) -> str:
        caches = "caches on the CPU" if self.caches_on_cpu else "caches on the device"
        return caches if self.rows is None else f"{caches}, {self.rows} samples at a time"
