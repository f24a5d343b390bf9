"""Every kernel traces into one graph: no Python decision depends on the data or, within a bucket, on the tokens."""

import pytest
import torch
from kernel_problems import (
    A16,
    CENTERED,
    CENTERED8,
    NORMAL,
    STATIC,
    STATIC8,
    TOKEN,
    TOKEN8,
    Problem,
    int_format,
    relative,
)
from rotations import by_token, rotated
from tiny_llava import write_tiny_llava
from transformers import StaticCache

from qvlm_plugin import planning
from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.kernels.int4_codes import INT4_CODES
from qvlm_plugin.kernels.int4_folded import INT4_FOLDED
from qvlm_plugin.kernels.int8 import INT8
from qvlm_plugin.kernels.nf4 import NF4
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.rotation import factors, rotation_of

CASES = [
    *[(INT4, int_format(4), activation) for activation in (A16, STATIC, TOKEN, CENTERED, NORMAL)],
    (INT4_FOLDED, int_format(4), STATIC),
    (INT4_CODES, int_format(4, 64, progressive=True), TOKEN),
    *[(INT8, int_format(8), activation) for activation in (A16, STATIC8, TOKEN8, CENTERED8)],
    (NF4, WeightFormat(kind="nf", bits=4, double_quantization=True), STATIC),
]


@pytest.mark.parametrize(
    ("kernel", "weight", "activation", "with_rotation", "dtype"),
    [
        *((*case, False, torch.bfloat16) for case in CASES),
        *((*case, True, torch.float32) for case in CASES if case[2] in (TOKEN, TOKEN8)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_the_whole_forward_pass_is_one_graph(kernel, weight, activation, with_rotation, dtype):
    if kernel is NF4:
        pytest.importorskip("bitsandbytes")
    problem = Problem.draw(dtype=dtype)
    layer = problem.quantized(kernel, weight, activation)
    if with_rotation:
        layer.rotate_inputs(factors(rotation_of("site", 256)))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for tokens in (70, 60, 3):
            x = problem.x[:tokens]
            assert torch.allclose(compiled(x), layer(x), rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with widths that packed kernels take, of one layer."""
    return write_tiny_llava(tmp_path_factory.mktemp("compiled") / "tiny", hidden=64, layers=1, vision_layers=2)


@pytest.mark.parametrize(
    ("scheme", "backend", "with_rotation"),
    [("w4a4", "packed", False), ("w8a8", "packed", False), ("w4a8", "packed", True), ("w4a4", "reference", True)],
)
def test_a_decode_step_with_a_static_cache_is_one_graph(folder, calibration, scheme, backend, with_rotation):
    loaded = load(str(folder), dtype="bfloat16")
    request = check_request("rtn", scheme, {"group_size": 32, "calibration_batch_size": 5})
    plan = planning.obtain_plan(loaded, request, calibration, cache=None)
    planning.apply(rotated(by_token(plan)) if with_rotation else plan, loaded, backend)
    decoder = loaded.model.model.language_model

    def step(token, position, cache):
        return decoder(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).last_hidden_state

    torch.compiler.reset()
    outputs = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        cache = StaticCache(decoder.config, max_cache_len=16)
        with torch.inference_mode():
            step(torch.arange(5, 13)[None], torch.arange(8)[None], cache)
            outputs.append(
                [run(torch.tensor([[token]]), torch.tensor([[8 + turn]]), cache) for turn, token in enumerate((40, 50))]
            )
    for eager, compiled in zip(*outputs, strict=True):
        assert relative(compiled, eager) < 0.02
