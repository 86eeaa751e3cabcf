"""Codes of 1 to 8 bits packed without gaps into bytes.

Layout: one little-endian bit stream. Code i takes the bits [i * bits, (i + 1) * bits), the lowest bit of a byte
first, so eight codes fill `bits` whole bytes. The last byte is padded with zeros. 8-bit codes are their own packed
form. Wider numbers are stored digit by digit: the low bytes of all of them, then what is above, packed in the same way.
"""

import torch
from torch import Tensor

from casp_pl.errors import IntegrityError

__all__ = ["pack", "pack_wide", "packed_size", "unpack", "unpack_wide"]

_CODES_PER_WORD = 8


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    _check_bits(bits)
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes of any shape, row by row -> flat uint8 of `packed_size(codes.numel(), bits)` bytes.

    Raises:
        ValueError: a code does not fit into `bits` bits, or `bits` is not 1 to 8.
    """
    _check_bits(bits)
    flat = codes.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >> bits):
        raise ValueError(f"codes from {int(flat.min())} to {int(flat.max())} do not fit into {bits} bits")
    if bits == 8:
        return flat.to(torch.uint8, copy=True)
    padded = torch.nn.functional.pad(flat.to(torch.int64), (0, -flat.numel() % _CODES_PER_WORD))
    columns = padded.view(-1, _CODES_PER_WORD)
    words = torch.zeros(columns.shape[0], dtype=torch.int64, device=codes.device)
    for position in range(_CODES_PER_WORD):
        words |= columns[:, position] << (position * bits)
    packed = torch.stack([(words >> (8 * byte)) & 0xFF for byte in range(bits)], dim=1)
    return packed.to(torch.uint8).view(-1)[: packed_size(flat.numel(), bits)].contiguous()


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `pack`: flat uint8 bytes -> flat uint8 codes (count,). No byte can make a code of 2**bits or more.

    Raises:
        IntegrityError: the number of bytes does not belong to `count` codes.
        ValueError: `bits` is not 1 to 8.
    """
    if packed.numel() != packed_size(count, bits):
        raise IntegrityError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, but {packed.numel()} are there:"
            " the file does not belong to this layer"
        )
    if bits == 8:
        return packed.reshape(-1)
    padded = torch.nn.functional.pad(packed.reshape(-1), (0, -packed.numel() % bits)).view(-1, bits)
    words = torch.zeros(padded.shape[0], dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        words |= padded[:, byte].to(torch.int64) << (8 * byte)
    mask = (1 << bits) - 1
    codes = torch.stack([(words >> (position * bits)) & mask for position in range(_CODES_PER_WORD)], dim=1)
    return codes.to(torch.uint8).view(-1)[:count].contiguous()


def pack_wide(numbers: Tensor, bits: int) -> Tensor:
    """Integers of any shape and of 1 bit or more -> flat uint8.

    Raises:
        ValueError: a number does not fit into `bits` bits.
    """
    *low, (place, width) = _digits(bits)
    wide = numbers.to(torch.int64)
    return torch.cat([*(pack((wide >> at) & 0xFF, size) for at, size in low), pack(wide >> place, width)])


def unpack_wide(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `pack_wide`: flat uint8 bytes -> int64 numbers (count,).

    Raises:
        IntegrityError: the number of bytes does not belong to `count` numbers.
    """
    numbers = torch.zeros(count, dtype=torch.int64, device=packed.device)
    for place, width in _digits(bits):
        size = packed_size(count, width) if place + width < bits else len(packed)  # the last checks what is left
        numbers |= unpack(packed[:size], count, width).to(torch.int64) << place
        packed = packed[size:]
    return numbers


def _digits(bits: int) -> list[tuple[int, int]]:
    """Place and width of every digit, the lowest first: (0, 8), (8, 8) ... and what remains."""
    return [(place, min(8, bits - place)) for place in range(0, bits, 8)]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
