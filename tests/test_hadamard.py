import pytest
import torch

from qvlm_plugin.hadamard import hadamard, has_hadamard, sylvester


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 28, 36, 44, 52, 76, 100, 108, 140, 148, 172, 344])
def test_rows_are_orthogonal_and_entries_of_one_magnitude(order):
    """Of both of Paley's kinds, of prime fields and others (28 = 27 + 1, 52 = 2 (25 + 1), 100 = 2 (49 + 1), 344).

    172 is Williamson's.
    """
    matrix = hadamard(order).double()
    assert matrix.abs().eq(1).all() and torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_the_orders_are_those_of_paleys_theorem():
    """Up to 100, all multiples of 4 but those that have no prime power of the right kind."""
    found = [order for order in range(1, 101) if has_hadamard(order)]
    assert found == [order for order in range(4, 101, 4) if order not in (16, 40, 56, 64, 88, 92, 96)]
    with pytest.raises(ValueError, match="order 92"):
        hadamard(92)


@pytest.mark.parametrize("power", range(6))
def test_powers_of_two_are_sylvesters(power):
    matrix = sylvester(power)
    assert torch.equal(matrix, matrix.T) and torch.equal(matrix @ matrix, 2**power * torch.eye(2**power))
