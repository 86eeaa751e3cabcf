"""Packing against arithmetic on one long Python integer."""

import pytest
import torch

from casp_pl.errors import IntegrityError
from casp_pl.kernels.packing import pack, pack_wide, packed_size, unpack, unpack_wide


def _random_codes(count: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 77, 1001])
def test_bytes_are_one_little_endian_stream(bits: int, count: int) -> None:
    codes = _random_codes(count, bits)
    stream = sum(code << (i * bits) for i, code in enumerate(codes.tolist()))
    expected = stream.to_bytes((count * bits + 7) // 8, "little")
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == expected
    assert len(expected) == packed_size(count, bits)
    assert torch.equal(unpack(packed, count, bits), codes)


def test_any_shape_and_integer_type_is_packed_row_by_row() -> None:
    codes = _random_codes(3 * 5 * 2, 3)
    assert torch.equal(pack(codes.view(3, 5, 2).long(), 3), pack(codes, 3))


@pytest.mark.parametrize("bits", [3, 8])
def test_packing_copies(bits: int) -> None:
    codes = _random_codes(16, bits)
    before = codes.clone()
    pack(codes, bits).zero_()
    assert torch.equal(codes, before)


@pytest.mark.parametrize("code", [-1, 4])
def test_codes_out_of_range_are_refused(code: int) -> None:
    with pytest.raises(ValueError, match="do not fit into 2 bits"):
        pack(torch.tensor([0, code]), 2)


def test_a_lying_length_is_refused() -> None:
    with pytest.raises(IntegrityError, match="10 codes of 3 bits take 4 bytes, but 5 are there"):
        unpack(torch.zeros(5, dtype=torch.uint8), 10, 3)


@pytest.mark.parametrize("bits", [0, 9])
def test_impossible_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(torch.zeros(1, dtype=torch.uint8), bits)


@pytest.mark.parametrize("bits", [1, 4, 8, 9, 15, 16, 17])
def test_wide_numbers_are_stored_digit_by_digit(bits: int) -> None:
    numbers = torch.randint(0, 2**bits, (3, 7), generator=torch.Generator().manual_seed(bits))
    digits = [[number >> place & 255 for number in numbers.flatten().tolist()] for place in range(0, bits, 8)]
    packed = [pack(torch.tensor(digit), min(8, bits - 8 * i)) for i, digit in enumerate(digits)]
    assert torch.equal(pack_wide(numbers, bits), torch.cat(packed))
    assert torch.equal(unpack_wide(pack_wide(numbers, bits), 21, bits), numbers.flatten())


@pytest.mark.parametrize("number", [-1, 512])
def test_wide_numbers_out_of_range_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match="do not fit into 1 bits"):
        pack_wide(torch.tensor([0, number]), 9)


@pytest.mark.parametrize("length", [7, 9])
def test_a_lying_length_of_wide_numbers_is_refused(length: int) -> None:
    with pytest.raises(IntegrityError, match="bytes"):
        unpack_wide(torch.zeros(length, dtype=torch.uint8), 7, 9)
