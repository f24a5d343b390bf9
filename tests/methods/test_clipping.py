import pytest
import torch

from qvlm_plugin.formats import NF_BLOCK, WeightFormat, clipped_format
from qvlm_plugin.kernels.reference import round_weight
from qvlm_plugin.methods.clipping import group_errors, search_clip

FACTORS = (1.0, 0.9, 0.75, 0.6)
CASES = [
    (WeightFormat(kind="int", bits=3, group_size=16), (6, 40)),  # the last group of a row is shorter
    (WeightFormat(kind="int", bits=3, group_size=16, symmetric=True), (6, 8)),  # shorter than a group
    (WeightFormat(kind="int", bits=2), (6, 40)),
    (WeightFormat(kind="nf", bits=3), (5, 128)),
    (WeightFormat(kind="nf", bits=3), (6, 40)),  # blocks reach over rows, the last one is shorter
    (WeightFormat(kind="nf", bits=2), (9, 24)),
]


def weight_and_tokens(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) ** 3  # heavy tails, so that clipping pays
    tokens = torch.randn(30, shape[1], generator=generator) * torch.rand(shape[1], generator=generator) * 5
    return weight, tokens


def errors_one_by_one(error, fmt, tokens):
    """The squared error of each group's part of the outputs, group by group and row by row."""
    rows, columns = error.shape
    if fmt.kind == "int":
        size = fmt.group_size or columns
        groups = [[(row, slice(at, at + size))] for row in range(rows) for at in range(0, columns, size)]
    else:
        groups = []
        for at in range(0, rows * columns, NF_BLOCK):
            flat = range(at, min(at + NF_BLOCK, rows * columns))
            per_row = {row: [i % columns for i in flat if i // columns == row] for row in {i // columns for i in flat}}
            groups.append(list(per_row.items()))
    return torch.tensor(
        [sum(float((tokens[:, at] @ error[row, at]).square().sum()) for row, at in group) for group in groups]
    )


@pytest.mark.parametrize("fmt, shape", CASES, ids=str)
def test_every_groups_factor_errs_least_at_the_output(fmt, shape):
    weight, tokens = weight_and_tokens(shape)
    clip = search_clip(weight, fmt, tokens, FACTORS)
    assert clip.numel() == fmt.groups(shape)

    def errors(factors):
        error = round_weight(weight, clipped_format(fmt), factors) - weight
        expected = errors_one_by_one(error, fmt, tokens)
        assert torch.allclose(group_errors(error, fmt, tokens).flatten(), expected, rtol=1e-3)
        return expected

    found, grid = errors(clip), torch.stack([errors(torch.full_like(clip, factor)) for factor in FACTORS])
    assert torch.allclose(found, grid.amin(dim=0), rtol=1e-3)
    assert found.sum() < grid[0].sum()
    assert {round(factor, 6) for factor in clip.flatten().tolist()} <= set(FACTORS)


def test_clipping_doubly_quantized_weights_errs_less_over_all():
    weight, tokens = weight_and_tokens((32, 128))
    fmt = WeightFormat(kind="nf", bits=3, double_quantization=True)
    clip = search_clip(weight, fmt, tokens, FACTORS)

    def error(factors):
        return float(group_errors(round_weight(weight, fmt, factors) - weight, fmt, tokens).sum())

    assert error(clip) < 0.95 * error(None)


def test_ties_are_not_clipped():
    fmt = WeightFormat(kind="int", bits=4, group_size=16)
    assert torch.equal(search_clip(torch.ones(4, 32), fmt, torch.zeros(5, 32), FACTORS), torch.ones(4, 2))


@pytest.mark.parametrize("fmt, shape", CASES, ids=str)
def test_without_tokens_each_group_of_the_weight_itself_errs_least(fmt, shape):
    weight, _ = weight_and_tokens(shape)
    clip = search_clip(weight, fmt, None, FACTORS)
    every_input = torch.eye(shape[1])
    assert torch.equal(clip, search_clip(weight, fmt, every_input, FACTORS)) or torch.allclose(
        group_errors(round_weight(weight, clipped_format(fmt), clip) - weight, fmt, None),
        group_errors(round_weight(weight, clipped_format(fmt), clip) - weight, fmt, every_input),
        rtol=1e-3,
    )
    assert clip.numel() == fmt.groups(shape)
