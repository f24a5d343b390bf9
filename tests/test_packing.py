import pytest
import torch

from qvlm_plugin.packing import pack_codes, packed_width, unpack_codes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 12])
def test_codes_are_packed_and_unpacked(bits, columns):
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, packed_width(columns, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, bits, columns), codes)
    each = {1: 8, 2: 4, 4: 2}.get(bits, 1)
    assert packed.shape[1] == -(-columns // each)


def test_the_first_code_is_in_the_upper_bits():
    assert pack_codes(torch.tensor([[1, 2]], dtype=torch.uint8), 4).item() == 0x12
    assert pack_codes(torch.tensor([[3, 0, 2]], dtype=torch.uint8), 2).item() == 0b11001000
    assert unpack_codes(torch.tensor([[0b11001000]], dtype=torch.uint8), 2).tolist() == [[3, 0, 2, 0]]
