"""Functions of one launch are used where they pass their test, and only there."""

import pytest
import torch
from kernel_problems import CENTERED, NORMAL, STATIC, STATIC8, TOKEN, TOKEN8, Problem, int_format, relative
from torch.utils._pytree import tree_map

from qvlm_plugin import rotation
from qvlm_plugin.kernels import fusable, fused
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.kernels.int4_codes import INT4_CODES
from qvlm_plugin.kernels.int8 import INT8

ROTATED = 576
"""Channels that are rotated."""
FACTORS = rotation.factors(rotation.rotation_of("site", ROTATED))
CASES = [
    ("points_of_tokens", "round_tokens", INT4, int_format(4), CENTERED, 256),
    ("points_of_tokens", "round_tokens", INT4, int_format(4), NORMAL, 256),
    ("codes_of_tokens", "round_tokens", INT8, int_format(8), TOKEN8, 256),
    ("points_of_channels", "round_channels", INT4, int_format(4), STATIC, 256),
    ("codes_of_channels", "round_channels", INT8, int_format(8), STATIC8, 256),
    ("multiply_codes", "multiply_codes", INT8, int_format(8), TOKEN8, 256),
    ("scale_product", "scale_product", INT4_CODES, int_format(4, 64, progressive=True), TOKEN, 256),
    ("rotate", "rotate_tokens", INT4, int_format(4), TOKEN, ROTATED),
]


@pytest.mark.parametrize(("function", "launched", "kernel", "weight", "activation", "channels"), CASES)
def test_what_fails_is_replaced(
    triton_cuda, monkeypatch, caplog, function, launched, kernel, weight, activation, channels
):
    problem = Problem.draw((64, channels), tokens=3, dtype=torch.bfloat16).to("cuda:0")
    layer = problem.quantized(kernel, weight, activation)
    if channels == ROTATED:
        layer.rotate_inputs([factor.to("cuda:0") for factor in FACTORS])

    def output():
        layer(problem.x.clone())  # tests whatever was not tested before
        with triton_cuda.counting():
            found = layer(problem.x.clone())
        return found.cpu(), launched in {call.operator for call in triton_cuda.launches}

    def raising(*arguments):
        raise RuntimeError("out of resources\nwhatever these are")

    def mistaken(*arguments):
        return tree_map(torch.neg, right(*arguments))

    right = getattr(fused, function)
    with torch.no_grad():
        expected, was_launched = output()
        assert was_launched and not caplog.records
        for wrong, what in (
            (raising, "RuntimeError: out of resources whatever these are"),
            (mistaken, "its relative error is "),
        ):
            monkeypatch.setattr(fused, function, wrong)
            fusable._passes.cache_clear()
            found, was_launched = output()
            assert not was_launched and relative(found, expected) < 5e-3
            messages = [record.getMessage() for record in caplog.records]
            assert len(messages) == 1 and what in messages[0] and "cuda:0" in messages[0]
            assert messages[0].startswith("torch's operators replace a Triton kernel (") and "\n" not in messages[0]
            caplog.clear()


def test_they_are_for_cuda_without_gradients_and_compilers(triton_cuda, monkeypatch):
    x = torch.ones(3, 64, device="cuda:0")
    assert fusable.tokens(x) and fusable.channels(x)
    assert fusable.rotations(torch.ones(2, ROTATED, device="cuda:0"), FACTORS)
    assert not fusable.tokens(x.cpu()) and not fusable.tokens(x.double()) and not fusable.rotations(x, FACTORS[:2])
    assert not fusable.tokens(x.clone().requires_grad_())
    codes = torch.ones(17, 64, dtype=torch.int8, device="cuda:0")
    assert fusable.products(codes[:16], torch.float16, 2) and fusable.scaling(codes.int(), torch.float16)
    assert not fusable.products(codes, torch.float16, 2) and not fusable.products(codes[:16], torch.float16, 3)
    with torch.no_grad():
        assert fusable.tokens(x.clone().requires_grad_())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fusable.tokens(x)


def test_older_devices_and_machines_without_triton_do_without(cuda, monkeypatch):
    x = torch.ones(3, 64, device="cuda:0")
    assert not fusable.tokens(x)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(fused, "_kernels", lambda: None)
    fused.has_kernels.cache_clear()
    assert not fusable.tokens(x)
