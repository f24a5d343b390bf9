"""Every kernel traces into one graph: no Python decision depends on the data or, within a bucket, on the tokens."""

import pytest
import torch
from kernel_problems import A16, STATIC, STATIC8, TOKEN, TOKEN8, Problem, int_format

from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.kernels.int4_folded import INT4_FOLDED
from qvlm_plugin.kernels.int8 import INT8
from qvlm_plugin.kernels.nf4 import NF4

CASES = [
    *[(INT4, int_format(4), activation) for activation in (A16, STATIC, TOKEN)],
    (INT4_FOLDED, int_format(4), STATIC),
    *[(INT8, int_format(8), activation) for activation in (A16, STATIC8, TOKEN8)],
    (NF4, WeightFormat(kind="nf", bits=4, double_quantization=True), STATIC),
]


@pytest.mark.parametrize(
    ("kernel", "weight", "activation"), CASES, ids=lambda value: getattr(value, "name", str(value))
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_forward_pass_is_one_graph(kernel, weight, activation, dtype):
    if kernel is NF4:
        pytest.importorskip("bitsandbytes")
    problem = Problem.draw(dtype=dtype)
    layer = problem.quantized(kernel, weight, activation)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for tokens in (70, 60, 3):
            x = problem.x[:tokens]
            assert torch.allclose(compiled(x), layer(x), rtol=1e-2, atol=1e-2)
