"""How many bytes of tensors are alive at most while something runs."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active, counts the memory of every tensor that an operation makes, once, until it is freed.

    Attributes:
        now, peak: bytes, those of the tensors that it is given included. A tensor that it is not given counts from when
            an operation first returns a view of it.
    """

    def __init__(self, *there):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()
        for tensor in there:
            self._count(tensor.untyped_storage())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self._known.discard(key)
        self.now -= size
