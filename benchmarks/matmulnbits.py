"""onnxruntime's product with 4-bit weights as a kernel, which kernels.py measures if onnxruntime is installed.

MatMulNBits with ``accuracy_level=4`` itself rounds inputs to 8 bits, in blocks as long as the weight's groups: it
represents W4A8, not W4A16, whose results it changes. A session computes one Linear; all sessions share their threads.

python benchmarks/matmulnbits.py                   # memory, time to load, and time of a call
python benchmarks/matmulnbits.py --linears 32
"""

import argparse
import time
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import psutil
import torch
from side_by_side import machine, time_in_turns
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.kernels.base import Kernel, as_stored, like_input
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.packing import unpack_codes

BLOCKS = (16, 32, 64, 128, 256)
"""Numbers of input channels per scale that the operator supports."""

_sessions = WeakTensorKeyDictionary()


def _obstacle(
    weight_format: WeightFormat, activation_format: ActivationFormat, shape: tuple[int, int], device: torch.device
) -> str | None:
    if device.type != "cpu" or activation_format.kind != "none" or weight_format.group_size not in BLOCKS:
        return f"it is for a CPU, and groups of {BLOCKS} input channels; it rounds inputs by itself"
    return INT4.obstacle(weight_format, activation_format, shape, device)


def _forward(x: Tensor, tensors: Mapping[str, Tensor], activation_format: ActivationFormat) -> Tensor:
    session = _sessions.get(tensors["codes"])
    if session is None:
        session = _sessions[tensors["codes"]] = _session(tensors)
    rows, inputs = len(tensors["codes"]), x.reshape(-1, x.shape[-1]).float().contiguous()
    out, binding = inputs.new_empty(len(inputs), rows), session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, tuple(inputs.shape), inputs.data_ptr())
    binding.bind_output("y", "cpu", 0, np.float32, tuple(out.shape), out.data_ptr())
    session.run_with_iobinding(binding)
    return like_input(out if "bias" not in tensors else out.add_(tensors["bias"]), x)


def _session(tensors: Mapping[str, Tensor]) -> onnxruntime.InferenceSession:
    """A session that multiplies by the weight of neutral ``int4`` tensors, of which it has its own copy."""
    codes = unpack_codes(tensors["codes"], 4)
    (rows, columns), groups = codes.shape, tensors["scale"].shape[1]
    constants = {
        "B": _nibbles(codes).reshape(rows, groups, -1),
        "scales": tensors["scale"].float().numpy(),
        "zero_points": _nibbles(tensors["zero_point"]),
    }
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=4, block_size=columns // groups, accuracy_level=4,
    )  # fmt: skip
    described = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["tokens", width])
        for name, width in (("x", columns), ("y", rows))
    ]
    held = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph([node], "linear", described[:1], described[1:], held)
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _nibbles(codes: Tensor) -> np.ndarray:
    """Codes packed two to a byte, the first in the lower half."""
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return (padded[:, ::2] | padded[:, 1::2] << 4).contiguous().numpy()


MATMULNBITS = Kernel("matmulnbits", _obstacle, INT4.prepare, as_stored, _forward, tolerance=0.03)
"""4-bit weights, multiplied by onnxruntime with inputs that it rounds to 8 bits."""

onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)


def main() -> None:
    """Print memory and loading time of sessions of 4096 x 4096 (the operator's weight: 8.9 MB), and time of a call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--linears", type=int, default=16, help="number of Linears of 4096 × 4096")
    count, weight_format = parser.parse_args().linears, WeightFormat(kind="int", bits=4, group_size=128)
    neutral = MATMULNBITS.prepare(torch.randn(4096, 4096) / 64, None, weight_format, ActivationFormat(), {})
    process, start = psutil.Process(), time.perf_counter()
    _session(neutral)  # what the library allocates only once
    before, start, sessions = process.memory_info().rss, time.perf_counter(), []
    for _ in range(count):
        sessions.append(_session(neutral))
    taken, seconds = (process.memory_info().rss - before) / count, (time.perf_counter() - start) / count
    small = MATMULNBITS.prepare(torch.randn(64, 128) / 8, None, weight_format, ActivationFormat(), {})
    runs = {"call": lambda: MATMULNBITS.forward(torch.zeros(1, 128), small, ActivationFormat())}
    call = time_in_turns(runs, 200, torch.device("cpu"))["call"].median
    print(machine(torch.device("cpu")), f"onnxruntime {onnxruntime.__version__}", sep="; ")
    print(f"4096 x 4096: {taken / 1e6:.1f} MB resident and {seconds:.2f} s to load for each Linear, {count} of them")
    print(f"64 x 128, one token: {1e6 * call:.0f} µs a call")


if __name__ == "__main__":
    main()
