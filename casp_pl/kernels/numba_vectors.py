"""Codes decoded into registers, eight weights at a time: weights, and products on CPUs without AVX-512 VBMI.

The entries of codebooks, or the patterns and signs of E8P, lie in a core's first cache. So one load brings the eight
weights that a code stands for, where a look-up of products brings one. A decoded vector serves four tokens.

numba does not keep vectors in registers by itself, so the innermost loops are written in LLVM's own language, which has
vectors on every CPU. The loop around them chooses among them by a number: numba cannot keep one in its cache that is
given its kernel. A thread owns rows and adds in one order, so results are the same for any number of threads.

Importing this module compiles nothing; the first call does, and numba keeps the result in a cache on disk.

Letters: N tokens, O rows, at least 4, G groups of 8 inputs, K codebooks, C entries, S spans of groups with scales of
their own.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from torch import Tensor

from casp_pl.kernels.llvm_vectors import (
    BYTE,
    BYTES,
    CONTRACT,
    FLOAT,
    FLOATS,
    INDEX,
    INT,
    INTS,
    WIDTH,
    add_product,
    alloca,
    for_range,
    intrinsic,
    load,
    spread,
    sum_of_lanes,
)
from casp_pl.kernels.numba_addresses import addresses, contiguous

__all__ = [
    "LEAST_ROWS",
    "multiply_additive",
    "multiply_lattice",
    "multiply_uniform",
    "rebuild_additive",
    "rebuild_lattice",
]

LEAST_ROWS = 4  # computed at once for a single token: their inputs are loaded once
_TOKENS, _FEWER_ROWS = 4, 2  # that share a decoded vector; the sums of both fill half of AVX2's registers
_PIECE = 64  # rows that one thread takes at a time, a multiple of LEAST_ROWS
_REBUILT = torch.float32, torch.uint8, torch.float32, torch.float32  # tables, codes, scales, weight
_MULTIPLIED = torch.float32, *_REBUILT  # x, tables, codes, weights, sums
_E8P_SIGNS, _E8P_SHIFTS, _E8P_END = 256 * 8, 2 * 256 * 8, 2 * 256 * 8 + 256  # in `lattice_tables`

_compiled: Any = njit(parallel=True, nogil=True, cache=True)


class _Place(NamedTuple):
    """What a decoder reads: the codes of a group, their number of bytes, the tables, and one number more."""

    codes: Any
    width: Any
    tables: Any
    setting: Any


Decode = Callable[[Any, _Place], list[Any]]
"""(builder, place) -> vectors of 8 floats whose sum is a group of weights."""


def _entry(builder: Any, place: _Place, book: Any) -> Any:
    """The entry of a codebook that a group's code chooses; the setting is C."""
    code = builder.zext(load(builder, BYTE, place.codes, book), INDEX)
    entry = builder.add(code, builder.mul(place.setting, book))
    return load(builder, FLOATS, place.tables, builder.mul(entry, INDEX(WIDTH)))


def _books(count: int) -> Decode:
    """Entries of so many codebooks."""
    return lambda builder, place: [_entry(builder, place, INDEX(book)) for book in range(count)]


def _any_books(builder: Any, place: _Place) -> list[Any]:
    """The sum of entries of as many codebooks as there are codes."""
    total = alloca(builder, FLOATS)
    builder.store(_entry(builder, place, INDEX(0)), total)
    with for_range(builder, builder.sub(place.width, INDEX(1))) as books:
        more = _entry(builder, place, builder.add(books.index, INDEX(1)))
        builder.store(builder.fadd(builder.load(total), more), total)
    return [builder.load(total)]


def _e8p(builder: Any, place: _Place, byte: int = 0) -> list[Any]:
    """A point of E8P: a pattern with signs and a shift, which the second byte says."""
    low, high = (builder.zext(load(builder, BYTE, place.codes, INDEX(byte + n)), INDEX) for n in (0, 1))
    pattern = load(builder, FLOATS, place.tables, builder.mul(low, INDEX(WIDTH)))
    signs = load(builder, FLOATS, place.tables, builder.add(builder.mul(high, INDEX(WIDTH)), INDEX(_E8P_SIGNS)))
    shift = load(builder, FLOAT, place.tables, builder.add(high, INDEX(_E8P_SHIFTS)))
    signed = builder.fmul(pattern, signs, flags=CONTRACT)
    return [builder.fadd(signed, spread(builder, FLOATS, shift), flags=CONTRACT)]


def _e8p_and_e8(builder: Any, place: _Place) -> list[Any]:
    """A point of E8P, and an entry of the finer codebook behind its tables."""
    code = builder.zext(load(builder, BYTE, place.codes, INDEX(2)), INDEX)
    fine = builder.add(builder.mul(code, INDEX(WIDTH)), INDEX(_E8P_END))
    return [*_e8p(builder, place), load(builder, FLOATS, place.tables, fine)]


def _two_e8p(builder: Any, place: _Place) -> list[Any]:
    """Two points of E8P, the second one times a number behind the tables."""
    (second,) = _e8p(builder, place, byte=2)
    (first,), scale = _e8p(builder, place), load(builder, FLOAT, place.tables, INDEX(_E8P_END))
    second = builder.fmul(second, spread(builder, FLOATS, scale), flags=CONTRACT)
    return [builder.fadd(first, second, flags=CONTRACT)]


def _uniform(builder: Any, place: _Place) -> list[Any]:
    """Eight codes of at most 4 bits each, the lowest first; the setting is their bits."""
    word, bits = load(builder, INT, place.codes, INDEX(0)), builder.trunc(place.setting, INT)
    places = builder.mul(spread(builder, INTS, bits), ir.Constant(INTS, list(range(WIDTH))))
    mask = builder.sub(builder.shl(INT(1), bits), INT(1))
    codes = builder.and_(builder.lshr(spread(builder, INTS, word), places), spread(builder, INTS, mask))
    return [builder.sitofp(codes, FLOATS)]


def _whole_bytes(builder: Any, place: _Place) -> list[Any]:
    """Eight codes of 8 bits."""
    codes = builder.zext(load(builder, BYTES, place.codes, INDEX(0)), INTS)
    return [builder.sitofp(codes, FLOATS)]


class _Sizes(NamedTuple):
    """Groups, bytes of a group's codes, groups a span, spans, rows."""

    groups: Any
    width: Any
    span: Any
    spans: Any
    rows: Any


def _sum_groups(builder: Any, decode: Decode, data: list[Any], sizes: _Sizes, token: Any, row: Any, shape: Any) -> Any:
    """All spans of `shape` = (rows, tokens) sums; returns where their vectors are."""
    x, tables, codes, weights, setting = data
    rows, tokens = shape
    cells = [(r, n) for r in range(rows) for n in range(tokens)]
    total, part = ({cell: alloca(builder, FLOATS) for cell in cells} for _ in range(2))
    zero = ir.Constant(FLOATS, [0.0] * WIDTH)
    for cell in cells:
        builder.store(zero, total[cell])
    with for_range(builder, sizes.spans) as spans:
        first = builder.mul(spans.index, sizes.span)
        rest = builder.sub(sizes.groups, first)
        count = builder.select(builder.icmp_signed("<", rest, sizes.span), rest, sizes.span)
        for cell in cells:
            builder.store(zero, part[cell])
        with for_range(builder, count) as groups:
            g = builder.add(first, groups.index)
            inputs = []
            for n in range(tokens):
                before = builder.mul(builder.add(token, INDEX(n)), sizes.groups)
                inputs.append(load(builder, FLOATS, x, builder.mul(builder.add(before, g), INDEX(WIDTH))))
            for r in range(rows):
                group = builder.add(builder.mul(builder.add(row, INDEX(r)), sizes.groups), g)
                own = builder.gep(codes, [builder.mul(group, sizes.width)])
                vectors = decode(builder, _Place(own, sizes.width, tables, setting))
                if tokens > 1:
                    vectors = [reduce(builder.fadd, vectors)]
                for n in range(tokens):
                    for vector in vectors:
                        add_product(builder, part[r, n], vector, inputs[n])
        for r in range(rows):
            at = builder.add(builder.mul(spans.index, sizes.rows), builder.add(row, INDEX(r)))
            scale = spread(builder, FLOATS, builder.load(builder.gep(weights, [at])))
            for n in range(tokens):
                add_product(builder, total[r, n], scale, builder.load(part[r, n]))
    return total


class _Call(NamedTuple):
    """What one call computes: sums of the rows from the first to before the last, of a token and those after it."""

    token: Any
    first: Any
    last: Any
    sums: Any


def _all_rows(builder: Any, decode: Decode, data: list[Any], sizes: _Sizes, call: _Call, shape: Any) -> None:
    """`shape` = (rows, tokens) sums at a time; the last rows start before the end where their number is no multiple."""
    rows, _ = shape
    length = builder.add(builder.sub(call.last, call.first), INDEX(rows - 1))
    with for_range(builder, builder.sdiv(length, INDEX(rows))) as blocks:
        row = builder.add(call.first, builder.mul(blocks.index, INDEX(rows)))
        latest = builder.sub(call.last, INDEX(rows))
        row = builder.select(builder.icmp_signed("<", row, latest), row, latest)
        total = _sum_groups(builder, decode, data, sizes, call.token, row, shape)
        for (r, n), vector in total.items():
            at = builder.mul(builder.add(call.token, INDEX(n)), sizes.rows)
            out = builder.gep(call.sums, [builder.add(at, builder.add(row, INDEX(r)))])
            builder.store(sum_of_lanes(builder, builder.load(vector)), out)


_MOST_BOOKS = 4  # of a loop that is written for their number
_DECODERS: list[Decode] = [
    _any_books, *map(_books, range(1, _MOST_BOOKS + 1)), _e8p, _e8p_and_e8, _two_e8p, _uniform, _whole_bytes
]  # fmt: skip
_LATTICE = _MOST_BOOKS - 1  # plus the bytes of a group: the number of its decoder
_NUMBERS, _BYTE_NUMBERS = range(len(_DECODERS))[-2:]


def _of_books(count: int) -> int:
    """The number of the decoder for so many codebooks."""
    return count if count <= _MOST_BOOKS else 0


def _products(rows: int, tokens: int) -> Any:
    """`rows` x `tokens` sums at a time by any of the decoders, as a function that numba can call."""

    @intrinsic
    def products(typing_context, kind, x, tables, codes, weights, setting, sizes, token, first, last, sums):  # type: ignore[no-untyped-def]
        # sums[token + n, first:last] of the next tokens, by the decoder with the number `kind`; arrays are addresses

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            def pointer(address: Any, kind: Any = FLOAT) -> Any:
                return builder.inttoptr(address, kind.as_pointer())

            kind, x, tables, codes, weights, setting, packed, token, first, last, sums = arguments
            data = [pointer(x), pointer(tables), pointer(codes, BYTE), pointer(weights), setting]
            own = _Sizes(*cgutils.unpack_tuple(builder, packed))  # type: ignore[no-untyped-call]
            for number, decode in enumerate(_DECODERS):
                with builder.if_then(builder.icmp_signed("==", kind, INDEX(number))):
                    _all_rows(builder, decode, data, own, _Call(token, first, last, pointer(sums)), (rows, tokens))
            return context.get_dummy_value()

        number = types.int64
        numbers = types.UniTuple(number, len(_Sizes._fields))  # type: ignore[no-untyped-call]
        return types.void(*[number] * 6, numbers, *[number] * 4), generate

    return products


_single = _products(LEAST_ROWS, 1)
_several = _products(_FEWER_ROWS, _TOKENS)


@njit(inline="always")
def _piece(number, rows):  # type: ignore[no-untyped-def]
    """First and last row of a piece: at least 4, the last ones again where fewer are left."""
    last = min(rows, (number + 1) * _PIECE)
    return min(number * _PIECE, max(0, last - LEAST_ROWS)), last


@_compiled
def _multiply(kind, x, tables, codes, weights, sums, setting, tokens, sizes):  # type: ignore[no-untyped-def]
    rows, fours = sizes[4], tokens // _TOKENS * _TOKENS
    for number in prange((rows + _PIECE - 1) // _PIECE):
        first, last = _piece(number, rows)
        for n in range(0, fours, _TOKENS):
            _several(kind, x, tables, codes, weights, setting, sizes, n, first, last, sums)
        for n in range(fours, tokens):
            _single(kind, x, tables, codes, weights, setting, sizes, n, first, last, sums)


@intrinsic
def _one_row(typing_context, kind, tables, codes, scales, setting, sizes, row, weight):  # type: ignore[no-untyped-def]
    # weight[row] by the decoder with the number `kind`; arrays are addresses

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kind, tables, codes, scales, setting, packed, row, weight = arguments
        own = _Sizes(*cgutils.unpack_tuple(builder, packed))  # type: ignore[no-untyped-call]
        tables, codes, scales, weight = (
            builder.inttoptr(address, element.as_pointer())
            for address, element in ((tables, FLOAT), (codes, BYTE), (scales, FLOAT), (weight, FLOATS))
        )
        scale = spread(builder, FLOATS, builder.load(builder.gep(scales, [row])))
        for number, decode in enumerate(_DECODERS):
            chosen = builder.icmp_signed("==", kind, INDEX(number))
            with builder.if_then(chosen), for_range(builder, own.groups) as groups:
                group = builder.add(builder.mul(row, own.groups), groups.index)
                place = _Place(builder.gep(codes, [builder.mul(group, own.width)]), own.width, tables, setting)
                vector = builder.fmul(reduce(builder.fadd, decode(builder, place)), scale)
                builder.store(vector, builder.gep(weight, [group]), align=4)
        return context.get_dummy_value()

    number = types.int64
    numbers = types.UniTuple(number, len(_Sizes._fields))  # type: ignore[no-untyped-call]
    return types.void(*[number] * 5, numbers, number, number), generate


@_compiled
def _rebuild(kind, tables, codes, scales, weight, setting, sizes):  # type: ignore[no-untyped-def]
    for row in prange(sizes[4]):
        _one_row(kind, tables, codes, scales, setting, sizes, row, weight)


def rebuild_additive(codes: Tensor, books: Tensor, scales: Tensor, weight: Tensor) -> None:
    """What `numba_additive.gather` writes, for groups of 8.

    Args:
        codes: uint8 (O, G, K), all below C.
        books: float32 (K, C, 8).
        scales: float32 (O,).
        weight: float32 (O, 8 G), contiguous, written.
    """
    (rows, groups, count), entries = codes.shape, books.shape[1]
    read = contiguous(books, codes, scales)
    _rebuild(_of_books(count), *addresses(_REBUILT, *read, weight), entries, (groups, count, groups, 1, rows))


def rebuild_lattice(codes: Tensor, tables: Tensor, scales: Tensor, weight: Tensor) -> None:
    """Rows of points of E8P, and finer ones.

    Args:
        codes: uint8 (O, G, 2, 3 or 4), as for `multiply_lattice`.
        tables: likewise.
        scales: float32 (O,).
        weight: float32 (O, 8 G), contiguous, written.
    """
    rows, groups, count = codes.shape
    read = contiguous(tables, codes, scales)
    _rebuild(_LATTICE + count, *addresses(_REBUILT, *read, weight), 0, (groups, count, groups, 1, rows))


def multiply_additive(x: Tensor, books: Tensor, codes: Tensor, weights: Tensor, span: int, sums: Tensor) -> None:
    """The sums of `numba_lookup.lookup` for groups of 8 inputs.

    Args:
        x: float32 (N, G, 8).
        books: float32 (K, C, 8).
        codes: uint8 (O, G K), all below C.
        weights: float32 (S, O).
        span: positions of a span, a multiple of K; the last may be shorter.
        sums: float32 (N, O), contiguous, written.
    """
    tokens, groups, _ = x.shape
    count, entries, _ = books.shape
    spans, rows = weights.shape
    read = contiguous(x, books, codes, weights)
    data = addresses(_MULTIPLIED, *read, sums)
    _multiply(_of_books(count), *data, entries, tokens, (groups, count, span // count, spans, rows))


def multiply_lattice(x: Tensor, tables: Tensor, codes: Tensor, weights: Tensor, sums: Tensor) -> None:
    """Products with points of E8P, and finer ones.

    Args:
        x: float32 (N, G, 8).
        tables: float32, flat, `lattice_tables`: of as many bits as a group has bytes.
        codes: uint8 (O, G, 2, 3 or 4), the low byte of a code first.
        weights: float32 (1, O), scales of the rows.
        sums: float32 (N, O), contiguous, written.
    """
    (tokens, groups, _), (rows, _, count) = x.shape, codes.shape
    read = contiguous(x, tables, codes, weights)
    _multiply(_LATTICE + count, *addresses(_MULTIPLIED, *read, sums), 0, tokens, (groups, count, groups, 1, rows))


def multiply_uniform(x: Tensor, bits: int, codes: Tensor, weights: Tensor, span: int, sums: Tensor) -> None:
    """Products with whole numbers.

    Args:
        x: float32 (N, G, 8).
        bits: of a code, 1 to 4 or 8.
        codes: uint8, flat: those of 8 inputs fill `bits` bytes, of all groups and rows in turn, and 4 bytes more.
        weights: float32 (S, O).
        span: groups of a span; the last may be shorter.
        sums: float32 (N, O), contiguous, written.
    """
    (tokens, groups, _), (spans, rows) = x.shape, weights.shape
    read = contiguous(x, weights, codes, weights)  # these have no tables
    kind = _BYTE_NUMBERS if bits == 8 else _NUMBERS
    _multiply(kind, *addresses(_MULTIPLIED, *read, sums), bits, tokens, (groups, bits, span, spans, rows))
