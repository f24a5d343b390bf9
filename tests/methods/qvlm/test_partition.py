import pytest

from qvlm_plugin.methods.qvlm.partition import partition


@pytest.mark.parametrize("max_depth", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.5, 99.0])
def test_blocks_cover_every_layer_exactly_once_and_are_not_too_deep(threshold, max_depth):
    dependencies = [0.1, 1.0, 2.0, 0.2, 0.9, 3.0, 0.0, 1.1, 1.2]
    blocks = partition(dependencies, threshold, max_depth)
    assert [layer for block in blocks for layer in block] == list(range(10))
    assert all(1 <= len(block) <= max_depth for block in blocks)


def test_every_block_meets_the_inequality_and_could_not_be_extended():
    dependencies, h0 = [0.1, 1.0, 2.0, 0.2, 0.9, 3.0, 0.0, 1.1, 1.2], 0.8
    blocks = partition(dependencies, h0, 3)
    assert max(map(len, blocks)) > 1
    for block in blocks:
        for end in range(block.start + 2, block.stop + 1):
            assert sum(dependencies[block.start : end - 1]) > (end - 1 - block.start) * h0
        if len(block) < 3 and block.stop < 10:
            assert sum(dependencies[block.start : block.stop]) <= len(block) * h0


def test_the_ends_of_the_threshold_give_single_layers_and_the_deepest_blocks():
    assert partition([1.0] * 5, 2.0, 3) == tuple(range(i, i + 1) for i in range(6))
    assert partition([1.0] * 5, 0.5, 3) == (range(0, 3), range(3, 6))
    assert partition([], 0.0, 3) == (range(0, 1),)
