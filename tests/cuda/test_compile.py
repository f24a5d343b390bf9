"""What runs on CUDA traces into one graph, too."""

import pytest
import torch
from emulated_cuda import EmulatedCUDA
from kernel_problems import A16, CENTERED8, STATIC, STATIC8, TOKEN, Problem, int_format
from torch._subclasses.fake_tensor import FakeTensorMode

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.kernels.int4_codes import INT4_CODES
from qvlm_plugin.kernels.int4_folded import INT4_FOLDED
from qvlm_plugin.kernels.int8 import INT8
from qvlm_plugin.kernels.nf4 import NF4
from qvlm_plugin.linear import QuantLinear

OLD = (7, 5)
CASES = [
    (INT4, int_format(4), CENTERED8), (INT4_FOLDED, int_format(4), STATIC),
    (INT4_CODES, int_format(4, 64, progressive=True), TOKEN), (INT8, int_format(8), A16),
    (INT8, int_format(8), STATIC8), (INT8, int_format(8), TOKEN),
    (NF4, WeightFormat(kind="nf", bits=4, double_quantization=True), TOKEN),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "weight", "activation"), CASES, ids=lambda each: getattr(each, "name", str(each)))
def test_a_forward_pass_is_one_graph(forgetful, kernel, weight, activation):
    """Of torch's own stand-ins for tensors on CUDA: compilers know no others without a GPU."""
    if kernel is NF4:
        pytest.importorskip("bitsandbytes")
    with EmulatedCUDA(OLD):
        emulated = Problem.draw(dtype=torch.bfloat16).to("cuda:0").quantized(kernel, weight, activation)
        layout = {name: (value.shape, value.stride(), value.dtype) for name, value in emulated.named_parameters()}
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    with FakeTensorMode(), torch.no_grad():
        tensors = {
            name: torch.empty_strided(shape, stride, dtype=dtype, device="cuda")
            for name, (shape, stride, dtype) in layout.items()
        }
        layer = QuantLinear(tensors, weight, activation, kernel, emulated.shape)
        if activation.kind == "dynamic_token":
            layer.rotate_inputs([torch.empty(256, device="cuda"), *torch.empty(2, 16, 16, device="cuda")])
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=True)
        for tokens in (70, 60):
            output = compiled(torch.empty(tokens, 256, dtype=torch.bfloat16, device="cuda"))
            assert (output.shape, output.dtype, output.device.type) == ((tokens, 64), torch.bfloat16, "cuda")
    assert len(graphs) == 1
