from dataclasses import replace

import pytest
import torch
from kernel_problems import A16, CENTERED, CENTERED8, CPU, STATIC, STATIC8, TOKEN, TOKEN8, int_format

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.kernels.int4 import INT4
from qvlm_plugin.kernels.int4_folded import INT4_FOLDED
from qvlm_plugin.kernels.int8 import INT8
from qvlm_plugin.kernels.nf4 import NF4
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.kernels.selftest import required_to_pass, self_test, skipped_on_failure

NF = WeightFormat(kind="nf", bits=4, double_quantization=True)


@pytest.mark.parametrize(
    ("kernel", "weight"),
    [(INT4, int_format(4)), (INT4, int_format(3, 32, symmetric=True)), (INT4, int_format(4, 64, clipped=True)),
     (INT4, int_format(3, 64, stored=True)), (INT8, int_format(8, symmetric=True, stored=True)),
     (INT8, int_format(8)), (INT8, int_format(6, None)), (NF4, NF)],
    ids=lambda value: getattr(value, "name", str(value)),
)  # fmt: skip
@pytest.mark.parametrize("activation", [A16, STATIC, STATIC8, TOKEN, TOKEN8, CENTERED, CENTERED8], ids=str)
def test_the_packed_kernels_pass(kernel, weight, activation):
    if kernel is NF4:
        pytest.importorskip("bitsandbytes")
    assert self_test(kernel, weight, activation, CPU) is None


@pytest.mark.parametrize("activation", [STATIC, STATIC8], ids=str)
def test_folded_codes_pass(activation):
    assert self_test(INT4_FOLDED, int_format(4), activation, CPU) is None


def test_failures_are_told_and_leave_the_random_state_alone():
    def noisy(x, tensors, activation_format):
        return 1.1 * INT4.forward(x, tensors, activation_format)

    def broken(x, tensors, activation_format):
        raise NotImplementedError("gone in\nthis version")

    state = torch.get_rng_state()
    wrong, absent = replace(INT4, forward=noisy), replace(INT4, forward=broken)
    assert "differ from the reference by 0.1" in self_test(wrong, int_format(4), A16, CPU)
    assert "NotImplementedError in torch.float32: gone in this version" in self_test(absent, int_format(4), A16, CPU)
    assert torch.equal(torch.get_rng_state(), state)

    problem = (int_format(4), A16, (64, 256), CPU)
    assert "self-test failed: NotImpl" in skipped_on_failure(absent).obstacle(*problem)
    with pytest.raises(
        QVLMError, match=r"backend=packed: kernel int4 fails its self-test on cpu .*backend=auto"
    ) as caught:
        required_to_pass(absent).obstacle(*problem)
    assert "\n" not in str(caught.value)
    for guard in (skipped_on_failure, required_to_pass):
        assert guard(INT4).obstacle(*problem) is None
        assert "5 output" in guard(absent).obstacle(int_format(4), A16, (5, 256), CPU)
        assert guard(REFERENCE).supports(*problem)


@pytest.mark.parametrize("count", [1, 3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_fails_for_one_count_of_tokens_or_one_type_is_found(count, dtype):
    def wrong(x, tensors, activation_format):
        right = NF4.forward(x, tensors, activation_format)
        return right.roll(1, dims=-1) if (len(x), x.dtype) == (count, dtype) else right

    pytest.importorskip("bitsandbytes")
    failure = self_test(replace(NF4, forward=wrong), NF, A16, CPU)
    assert "outputs differ from the reference" in failure and str(dtype) in failure
