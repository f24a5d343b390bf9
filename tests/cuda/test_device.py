"""The emulated device does what tests on it rely on."""

import inspect
from pathlib import Path

import pytest
import torch
from cuda_operators import codes_of_int4pack, convert_weight_to_int4pack

from qvlm_plugin.packing import pack_codes


def place(call):
    return Path(call.file).name, call.line


def test_it_computes_as_the_cpu_does(cuda):
    x = torch.arange(12.0, device="cuda:0").view(3, 4)
    weight = torch.nn.Parameter(torch.randn(5, 4).to("cuda:0"))
    assert x.device == weight.device == torch.device("cuda:0") and weight.is_cuda
    x[1:, ::2].mul_(-1)  # a view
    output = torch.nn.functional.linear(x, weight).softmax(-1)
    output[:, 0].sum().backward()
    expected = weight.detach().cpu().requires_grad_()
    same = torch.nn.functional.linear(x.cpu(), expected).softmax(-1)
    same[:, 0].sum().backward()
    assert torch.equal(output.cpu(), same) and torch.equal(weight.grad.cpu(), expected.grad)
    assert weight.grad.device == torch.device("cuda:0")


def test_parameters_wait_on_the_cpu(cuda):
    weight = torch.nn.Parameter(torch.ones(2, device="cuda:1"))
    weight.data = weight.data.cpu()
    assert weight.device == torch.device("cpu") and not weight.is_cuda and type(weight + torch.ones(2)) is torch.Tensor
    with pytest.raises(RuntimeError, match="found cpu, cuda:1"):
        weight + torch.ones(2, device="cuda:1")
    weight.data = weight.data.to("cuda:1")
    assert weight.is_cuda and (weight + weight.new_tensor([1.0, 2.0])).tolist() == [2, 3]


def test_parameters_have_views_in_inference_mode(cuda):
    weight = torch.nn.Parameter(torch.ones(2, 3, device="cuda:0"))
    with torch.inference_mode():
        assert (weight.expand(2, -1).t()[1:] + weight[0, 1:].sum()).tolist() == [[3, 3], [3, 3]]
        assert weight.view(6)[2:].mul(2).is_inference() and not weight.view(6).is_inference()
        assert torch.ones(3).to(weight).device == weight.device


def test_operators_are_launched_and_views_are_not(cuda):
    x, index = torch.ones(3, 4, device="cuda:0"), torch.arange(2, device="cuda:0")
    query = torch.ones(1, 2, 3, 4, device="cuda:0")
    cases = [
        (0, lambda: x.view(4, 3).t()[1:].unsqueeze(0).expand(2, -1, -1).detach()),
        (0, lambda: (torch.empty(3, device="cuda:0"), x.new_empty(3), torch.empty_like(x), x.shape, x.float())),
        (1, lambda: x + 1),
        (1, lambda: x.half()),
        (1, lambda: x.t().contiguous()),
        (1, lambda: torch.zeros(3, device="cuda:0")),
        (1, lambda: torch.nn.functional.linear(x, x)),
        (1, lambda: x[index]),
        (2, lambda: x.softmax(-1).mul_(2)),
        (1, lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query)),
    ]
    for count, run in cases:
        with cuda.counting(), torch.no_grad():
            run()
        assert cuda.launches.total() == count, inspect.getsource(run)
        assert not cuda.synchronizations and not cuda.uploads


def test_what_waits_for_the_device_is_told_with_its_line(cuda):
    x = torch.ones(3, device="cuda:0")
    mask = x > 0
    waiting = (
        x[0].item,
        x.tolist,
        x.cpu,
        mask.nonzero,
        lambda: x[mask],
        lambda: bool(mask[0]),
        lambda: torch.equal(x, x),
    )
    for run in waiting:
        with cuda.counting():
            run()
        assert cuda.synchronizations.total() == 1 and not cuda.uploads, run
        assert {place(call)[0] for call in cuda.synchronizations} == {Path(__file__).name}

    def write_number():
        x[mask] = 2.0

    for run in (write_number, lambda: x.masked_fill(mask, 1.0), lambda: x.to("cuda:1"), lambda: x * torch.tensor(2.0)):
        with cuda.counting():
            run()
        assert not cuda.synchronizations, run
    with cuda.counting():
        torch.tensor([1, 2], device="cuda:0")
    assert cuda.uploads.total() == 1


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_devices_do_not_mix(cuda, other):
    x, y = torch.ones(3, device="cuda:0"), torch.ones(3, device=other)
    line = inspect.currentframe().f_lineno + 2
    with pytest.raises(RuntimeError, match=f"same device, found {', '.join(sorted(['cuda:0', other]))}:") as caught:
        x + y
    assert f"{__file__}:{line}" in str(caught.value)
    for mixed in (lambda: torch.cat([x, y]), lambda: x.mul_(y), lambda: torch.dot(y, x)):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert (x + y.to("cuda:0")).tolist() == [2, 2, 2]


def test_integer_products_have_their_sizes(cuda):
    def product(rows, inner, columns):
        a, b = (torch.ones(*shape, dtype=torch.int8, device="cuda:0") for shape in ((rows, inner), (columns, inner)))
        return torch._int_mm(a, b.t())

    assert product(17, 8, 16).unique().tolist() == [8]
    wrong = (((16, 8, 8), "greater than 16"), ((17, 12, 8), r"self.size\(1\)"), ((17, 8, 12), r"mat2.size\(1\)"))
    for sizes, what in wrong:
        with pytest.raises(RuntimeError, match=what):
            product(*sizes)


@pytest.mark.parametrize("inner", [2, 4, 8])
def test_tiles_of_four_bits(cuda, inner):
    codes = torch.randint(16, (16, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(inner))
    packed = convert_weight_to_int4pack(pack_codes(codes, 4), inner)
    assert packed.shape == (2, 16 // inner, 32, inner // 2)
    assert torch.equal(codes_of_int4pack(packed), codes)
    # The first thread's first word: columns 0, 8, 16 and 24 of row 0, then the next ones.
    word = [int(packed[0, 0, 0, 0]) >> 4 * nibble & 15 for nibble in range(8)]
    assert word == codes[0, [0, 8, 16, 24, 1, 9, 17, 25]].tolist()
    # Four threads to a row, with two columns each.
    assert int(packed[1, 0, 4 * 3 + 2, 0]) & 15 == codes[8 + 3, 2 * 2]


def test_products_with_four_bits_have_their_types(cuda):
    codes = torch.randint(16, (16, 128), dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pack_codes(codes, 4).to("cuda:0"), 8)
    x, pairs = torch.randn(3, 128).bfloat16(), torch.randn(2, 16, 2).bfloat16()
    product = torch.ops.aten._weight_int4pack_mm(x.to("cuda:0"), packed, 64, pairs.to("cuda:0"))
    scale, zero = (pair.t().float().repeat_interleave(64, 1) for pair in pairs.unbind(-1))
    expected = x.float() @ ((codes.float() - 8) * scale + zero).bfloat16().float().t()
    assert product.dtype == torch.bfloat16 and torch.equal(product.cpu(), expected.bfloat16())
    for wrong in (x.half(), x.t().contiguous().t()):
        with pytest.raises(RuntimeError, match="bfloat16 and contiguous"):
            torch.ops.aten._weight_int4pack_mm(wrong.to("cuda:0"), packed, 64, pairs.to("cuda:0"))
    with pytest.raises(RuntimeError, match="scales and zeros"):
        torch.ops.aten._weight_int4pack_mm(x.to("cuda:0"), packed, 64, pairs.half().to("cuda:0"))
    with pytest.raises(RuntimeError, match="no groups of 16"):
        torch.ops.aten._weight_int4pack_mm(x.to("cuda:0"), packed, 16, pairs.to("cuda:0"))
