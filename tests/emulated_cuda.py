"""CUDA devices without a GPU: tensors with data on the CPU that say they are on cuda:0 or cuda:1.

While `EmulatedCUDA` is active, torch makes such tensors wherever that device is asked for. Operators compute on the
CPU, but as on CUDA: tensors of different devices do not mix, CUDA's own operators have their preconditions and layouts
(`cuda_operators`), and what a GPU's driver would be asked for is counted, each with the line that asked for it:

* launches: operators that start a kernel. Views, allocations and metadata start none. Composite operators are counted
  by what they are made of; attention is one, as the fused kernel of CUDA is.
* synchronizations: what waits for the device, to read a number or the size of a result.
* uploads: copies of CPU tensors to a device, which wait for the device, too, unless memory is pinned.

    with EmulatedCUDA() as cuda, cuda.counting():
        x = torch.ones(3, device="cuda:0")
    assert cuda.launches.total() == 1
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from cuda_operators import LAUNCHES, OPERATORS, attention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
CPU = torch.device("cpu")
DEVICES = 2
TRITONS = (8, 0)
"""The compute capability from which Triton's kernels are used."""

_NO_LAUNCH = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten.detach.default, aten.alias.default, aten.lift_fresh.default,
    aten._unsafe_view.default, aten._reshape_alias.default, aten._local_scalar_dense.default, aten.is_same_size.default,
}  # fmt: skip
_WAITING = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
_COPIES = {aten._to_copy.default, aten.copy_.default}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Call(NamedTuple):
    """An operator and the line that asked for it."""

    operator: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.operator} at {self.file}:{self.line}"


class EmulatedTensor(torch.Tensor):
    """A tensor that says it is on a CUDA device, with its data on the CPU.

    For C++ it is on a meta device with the same index: torch's autograd asks the driver about CUDA's.
    """

    data_on_cpu: Tensor
    place: torch.device
    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor, device: torch.device) -> "EmulatedTensor":
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            device=torch.device("meta", device.index or 0), requires_grad=False,
        )  # fmt: skip
        wrapper.data_on_cpu, wrapper.place = data, device
        return wrapper

    @property
    def device(self) -> torch.device:
        """As any tensor's; the CPU after data there was assigned."""
        return self.place

    @property
    def is_cuda(self) -> bool:
        """As any tensor's."""
        return self.place.type == "cuda"

    @property
    def data(self) -> Tensor:
        """As any tensor's; what is assigned brings its data and their place."""
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        emulated = value if isinstance(value, EmulatedTensor) else EmulatedTensor(value, CPU)
        Tensor.data.__set__(self, emulated)
        self.data_on_cpu, self.place = emulated.data_on_cpu, emulated.place

    def new_tensor(self, data: object, **options: object) -> Tensor:
        """Which C++ would make on a meta device."""
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if EmulatedCUDA.active is None:
            raise RuntimeError(f"{func} on a tensor of an emulated device, which is no longer there")
        return EmulatedCUDA.active.run(func, args, kwargs or {})

    def untyped_storage(self) -> torch.UntypedStorage:
        """Of its data, which tells whether two share memory."""
        return self.data_on_cpu.untyped_storage()

    def tolist(self) -> list:
        """Which C++ refuses to subclasses."""
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"EmulatedTensor({tuple(self.shape)}, {self.dtype}, {self.device})"


class _Dispatch(TorchDispatchMode):
    """Sends every operator to the emulated devices, those that make tensors among them."""

    def __init__(self, devices: "EmulatedCUDA") -> None:
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.devices.run(func, args, kwargs or {})


class EmulatedCUDA:
    """A machine with CUDA devices, as long as its context is active.

    Attributes:
        launches, synchronizations, uploads: how often each `Call` was made in the last context of `counting`.
    """

    active: "EmulatedCUDA | None" = None

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        """Emulate devices of a compute capability."""
        self.capability = capability
        self.launches, self.synchronizations, self.uploads = Counter(), Counter(), Counter()
        self._counts, self._dispatch, self._patches = False, _Dispatch(self), ExitStack()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is done in the context, and nothing else."""
        self.launches, self.synchronizations, self.uploads = Counter(), Counter(), Counter()
        self._counts = True
        try:
            yield
        finally:
            self._counts = False

    def __enter__(self) -> "EmulatedCUDA":
        torch._C._set_only_lift_cpu_tensors(True)
        self._patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        # `module.to` would put such a tensor's metadata into a parameter of another class.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        cuda = {
            "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: DEVICES,
            "current_device": lambda: 0, "is_initialized": lambda: False, "synchronize": lambda *_: None,
            "is_current_stream_capturing": lambda: False, "empty_cache": lambda: None,
            "mem_get_info": lambda *_: (2**36, 2**36), "device": lambda *_: nullcontext(),
            "get_device_name": lambda *_: "emulated", "get_device_capability": lambda *_: self.capability,
        }  # fmt: skip
        for name, value in cuda.items():
            self._patches.enter_context(mock.patch.object(torch.cuda, name, value))
        # Optimizers ask its stream whether it records a graph.
        self._patches.enter_context(mock.patch.object(torch.accelerator, "current_accelerator", lambda *_, **__: None))
        if self.capability >= TRITONS:
            self._patches.enter_context(import_module("emulated_triton").interpreted(self._start))
        # Weights are loaded, and gradients taken, by the thread that sees the devices.
        self._patches.enter_context(mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
        self._patches.enter_context(torch.autograd.set_multithreading_enabled(False))
        self._patches.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        self._patches.enter_context(mock.patch.object(EmulatedCUDA, "active", self))
        self._patches.enter_context(self._dispatch)
        return self

    def _start(self, kernel: str, tensors: list[Tensor]) -> list[Tensor]:
        """Count a kernel of Triton; its tensors' data."""
        self._device(kernel, tensors, {})
        if self._counts:
            self.launches[_caller(kernel)] += 1
        return [getattr(tensor, "data_on_cpu", tensor) for tensor in tensors]

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def run(self, func, args: tuple, kwargs: dict):
        """An operator, on the devices of its arguments."""
        named = kwargs.get("device")
        leaves, structure = tree_flatten((args, kwargs))
        leaves = [_meant(leaf) if isinstance(leaf, torch.device) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, structure)
        if not any(map(_is_emulated, leaves)):
            return func(*args, **kwargs)
        if func._can_decompose() and str(func) not in OPERATORS:
            with self._dispatch:
                return func.decompose(*args, **kwargs)
        device = self._device(func, leaves, kwargs)
        if func is aten._to_copy.default and _is_there(args[0], named, kwargs):
            return args[0].detach() if args[0].requires_grad else args[0]
        if self._counts:
            self._count(func, args, kwargs)
        wrappers = {id(leaf.data_on_cpu): leaf for leaf in leaves if isinstance(leaf, EmulatedTensor)}
        inner = [leaf.data_on_cpu if isinstance(leaf, EmulatedTensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(inner, structure)
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        if func is aten.detach_.default:
            return leaves[0]
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func}: metadata that changes in place")
        result = OPERATORS.get(str(func), func)(*args, **kwargs)

        def wrapped(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            if id(value) in wrappers:  # written to in place
                return wrappers[id(value)]
            if device.type != "cuda":
                return value
            # In inference mode, too, a view counts versions if what it is a view of does.
            versioned = func.is_view and torch.is_inference_mode_enabled() and not leaves[0].is_inference()
            with torch.inference_mode(False) if versioned else nullcontext():
                return EmulatedTensor(value, device)

        return tree_map(wrapped, result)

    def _device(self, func: Callable, leaves: list, kwargs: dict) -> torch.device:
        """Of the results."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        emulated = {tensor.device for tensor in tensors if tensor.is_cuda}
        asked = kwargs.get("device")
        if func in _COPIES or not emulated:
            return asked or tensors[0].device
        others = [tensor for tensor in self._checked(func, tensors) if not tensor.is_cuda]
        if len(emulated) > 1 or others:
            devices = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
            raise RuntimeError(f"Expected all tensors to be on the same device, found {devices}: {_caller(func)}")
        return asked or next(iter(emulated))

    @staticmethod
    def _checked(func, tensors: list[Tensor]) -> list[Tensor]:
        """Those that have to be on one device: numbers on the CPU go with all, and so do indices."""
        if torch.Tag.pointwise in getattr(func, "tags", ()) or func in (aten.where.self, aten.fill_.Tensor):
            return [tensor for tensor in tensors if tensor.dim()]
        return tensors[:1] if func in _INDEXING else tensors

    def _count(self, func: Callable, args: tuple, kwargs: dict) -> None:
        call = _caller(func)
        moved = None
        if func in _COPIES:
            target = args[0] if func is aten.copy_.default else kwargs.get("device") or args[0].device
            target = target.device if isinstance(target, Tensor) else torch.device(target)
            source = args[1] if func is aten.copy_.default else args[0]
            moved = (source.device.type, target.type) if source.device.type != target.type else None
        if moved == ("cpu", "cuda"):
            self.uploads[call] += 1
        elif moved and not kwargs.get("non_blocking"):
            self.synchronizations[call] += 1
        if func in _WAITING and not (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None):
            self.synchronizations[call] += 1
        if func in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            number = func is not aten.index.Tensor and args[2].numel() == 1 and not (args[3:] and args[3])
            if masks and not number:
                self.synchronizations[call] += 1
            if any(index.device.type == "cpu" and index.dim() for index in indices):
                self.uploads[call] += 1
        if not func.is_view and func not in _NO_LAUNCH and moved is None:
            self.launches[call] += LAUNCHES.get(str(func), 1)


def _is_emulated(value: object) -> bool:
    """An emulated tensor, or a device that is asked for."""
    return isinstance(value, EmulatedTensor) or (isinstance(value, torch.device) and value.type == "cuda")


def _meant(device: torch.device) -> torch.device:
    """The emulated device that C++ or a user asks for, with its index; any other as it is."""
    if device.type == "cuda" or (device.type == "meta" and device.index is not None):
        return torch.device("cuda", device.index or 0)
    return device


def _is_there(tensor: Tensor, named: torch.device | None, options: dict) -> bool:
    """Whether nothing is to be copied to the device that is ``named``: C++ sees another, as it is CUDA's by name."""
    same = named is not None and named.type == "cuda" and options["device"] == tensor.device
    same = same and options.get("dtype") in (None, tensor.dtype)
    return same and options.get("memory_format") in (None, torch.preserve_format)


def _caller(func: object) -> Call:
    """The operator, and the line outside torch and these modules that asked for it."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_torch(frame.f_code.co_filename):
        frame = frame.f_back
    return Call(str(func), frame.f_code.co_filename, frame.f_lineno)


_SITE = os.path.dirname(os.path.dirname(torch.__file__))
_TORCH = tuple(os.path.join(_SITE, name, "") for name in ("torch", "triton"))
_OWN = ("contextlib.py", "emulated_cuda.py", "emulated_triton.py", "cuda_operators.py")


def _is_torch(file: str) -> bool:
    return file.startswith(_TORCH) or os.path.basename(file) in _OWN
