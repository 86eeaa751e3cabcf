"""Products with codes by decoding them into registers, eight weights at a time: for CPUs without AVX-512 VBMI.

The entries of two codebooks, or the patterns of E8P, lie in a core's first cache. So one load brings the eight weights
that a code stands for, where a look-up of products brings one. A decoded vector serves four tokens.

numba does not keep vectors in registers by itself, so the innermost loops are written in LLVM's own language, which has
vectors on every CPU. The loop around them chooses among them by a number: numba cannot keep one in its cache that is
given its kernel. A thread owns rows and adds in one order, so results are the same for any number of threads.

Importing this module compiles nothing; the first call does, and numba keeps the result in a cache on disk.

Letters: N tokens, O rows, at least 4, G groups of 8 inputs, K codebooks, C entries, S spans of groups with scales of
their own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from casp_pl.kernels.numba_addresses import addresses, contiguous

__all__ = ["LEAST_ROWS", "multiply_additive", "multiply_e8p", "multiply_uniform"]

LEAST_ROWS = 4  # computed at once for a single token: their inputs are loaded once
_TOKENS, _FEWER_ROWS = 4, 2  # that share a decoded vector; the sums of both fill half of AVX2's registers
_PIECE = 64  # rows that one thread takes at a time, a multiple of LEAST_ROWS
_WIDTH = 8

_PAIRS, _SUMS, _LATTICE, _NUMBERS, _BYTE_NUMBERS = range(5)  # kinds of codes

_INDEX, _INT, _BYTE, _FLOAT = ir.IntType(64), ir.IntType(32), ir.IntType(8), ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, _WIDTH)
_INTS = ir.VectorType(ir.IntType(32), _WIDTH)
_BYTES = ir.VectorType(ir.IntType(8), _WIDTH)
_CONTRACT = ("contract",)  # a product and a sum may become one instruction

_compiled: Any = njit(parallel=True, nogil=True, cache=True)
_for_range: Any = cgutils.for_range
_alloca: Any = cgutils.alloca_once


class _Place(NamedTuple):
    """What a decoder reads: the codes of a group, their number of bytes, the tables, and one number more."""

    codes: Any
    width: Any
    tables: Any
    setting: Any


Decode = Callable[[Any, _Place], list[Any]]
"""(builder, place) -> vectors of 8 floats whose sum is a group of weights."""


def _spread(builder: Any, kind: ir.VectorType, value: Any) -> Any:
    """A vector of one value."""
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * _WIDTH))


def _load(builder: Any, kind: Any, base: Any, offset: Any) -> Any:
    """A value of some type behind an offset in elements of the base."""
    return builder.load(builder.bitcast(builder.gep(base, [offset]), kind.as_pointer()), align=1, typ=kind)


def _entry(builder: Any, place: _Place, book: Any) -> Any:
    """The entry of a codebook that a group's code chooses; the setting is C."""
    code = builder.zext(_load(builder, _BYTE, place.codes, book), _INDEX)
    entry = builder.add(code, builder.mul(place.setting, book))
    return _load(builder, _FLOATS, place.tables, builder.mul(entry, _INDEX(_WIDTH)))


def _two_books(builder: Any, place: _Place) -> list[Any]:
    """Entries of two codebooks."""
    return [_entry(builder, place, _INDEX(book)) for book in range(2)]


def _any_books(builder: Any, place: _Place) -> list[Any]:
    """The sum of entries of as many codebooks as there are codes."""
    total = _alloca(builder, _FLOATS)
    builder.store(_entry(builder, place, _INDEX(0)), total)
    with _for_range(builder, builder.sub(place.width, _INDEX(1))) as books:
        more = _entry(builder, place, builder.add(books.index, _INDEX(1)))
        builder.store(builder.fadd(builder.load(total), more), total)
    return [builder.load(total)]


def _e8p(builder: Any, place: _Place) -> list[Any]:
    """A point of E8P in quarters: bytes of the pattern, flipped and shifted as the second byte says."""
    codes = (builder.zext(_load(builder, _BYTE, place.codes, _INDEX(number)), _INDEX) for number in (0, 1))
    low, high = (builder.mul(code, _INDEX(_WIDTH)) for code in codes)
    flips, shifts = (builder.add(high, _INDEX(table * 256 * _WIDTH)) for table in (1, 2))
    pattern, flip, shift = (_load(builder, _BYTES, place.tables, at) for at in (low, flips, shifts))
    point = builder.add(builder.xor(pattern, flip), shift)
    return [builder.sitofp(builder.sext(point, _INTS), _FLOATS)]


def _uniform(builder: Any, place: _Place) -> list[Any]:
    """Eight codes of at most 4 bits each, the lowest first; the setting is their bits."""
    word, bits = _load(builder, _INT, place.codes, _INDEX(0)), builder.trunc(place.setting, _INT)
    places = builder.mul(_spread(builder, _INTS, bits), ir.Constant(_INTS, list(range(_WIDTH))))
    mask = builder.sub(builder.shl(_INT(1), bits), _INT(1))
    codes = builder.and_(builder.lshr(_spread(builder, _INTS, word), places), _spread(builder, _INTS, mask))
    return [builder.sitofp(codes, _FLOATS)]


def _whole_bytes(builder: Any, place: _Place) -> list[Any]:
    """Eight codes of 8 bits."""
    codes = builder.zext(_load(builder, _BYTES, place.codes, _INDEX(0)), _INTS)
    return [builder.sitofp(codes, _FLOATS)]


def _add_product(builder: Any, place: Any, left: Any, right: Any) -> None:
    """A vector in memory, which LLVM keeps in a register, grows by a product."""
    product = builder.fmul(left, right, flags=_CONTRACT)
    builder.store(builder.fadd(builder.load(place), product, flags=_CONTRACT), place)


def _total(builder: Any, vector: Any) -> Any:
    """The sum of eight floats, in pairs."""
    parts = [builder.extract_element(vector, _INT(lane)) for lane in range(_WIDTH)]
    while len(parts) > 1:
        parts = [builder.fadd(left, right) for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


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
    total, part = ({cell: _alloca(builder, _FLOATS) for cell in cells} for _ in range(2))
    zero = ir.Constant(_FLOATS, [0.0] * _WIDTH)
    for cell in cells:
        builder.store(zero, total[cell])
    with _for_range(builder, sizes.spans) as spans:
        first = builder.mul(spans.index, sizes.span)
        rest = builder.sub(sizes.groups, first)
        count = builder.select(builder.icmp_signed("<", rest, sizes.span), rest, sizes.span)
        for cell in cells:
            builder.store(zero, part[cell])
        with _for_range(builder, count) as groups:
            g = builder.add(first, groups.index)
            inputs = []
            for n in range(tokens):
                before = builder.mul(builder.add(token, _INDEX(n)), sizes.groups)
                inputs.append(_load(builder, _FLOATS, x, builder.mul(builder.add(before, g), _INDEX(_WIDTH))))
            for r in range(rows):
                group = builder.add(builder.mul(builder.add(row, _INDEX(r)), sizes.groups), g)
                own = builder.gep(codes, [builder.mul(group, sizes.width)])
                vectors = decode(builder, _Place(own, sizes.width, tables, setting))
                if tokens > 1 and len(vectors) > 1:
                    vectors = [builder.fadd(*vectors)]
                for n in range(tokens):
                    for vector in vectors:
                        _add_product(builder, part[r, n], vector, inputs[n])
        for r in range(rows):
            at = builder.add(builder.mul(spans.index, sizes.rows), builder.add(row, _INDEX(r)))
            scale = _spread(builder, _FLOATS, builder.load(builder.gep(weights, [at])))
            for n in range(tokens):
                _add_product(builder, total[r, n], scale, builder.load(part[r, n]))
    return total


def _products(decode: Decode, entry: Any, rows: int, tokens: int) -> Any:
    """`rows` x `tokens` sums at a time, as a function that numba can call; tables hold values of the type `entry`."""
    kinds = [_FLOAT, entry, _BYTE, _FLOAT]

    @intrinsic
    def products(typing_context, x, tables, codes, weights, setting, sizes, token, first, last, sums):  # type: ignore[no-untyped-def]
        # sums[token + n, first:last] of the next tokens. Arrays are addresses. The last rows start before the end, so
        # that their number need not be a multiple.

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            def place(address: Any, kind: Any) -> Any:
                return builder.inttoptr(address, kind.as_pointer())

            own = _Sizes(*cgutils.unpack_tuple(builder, arguments[5]))  # type: ignore[no-untyped-call]
            token, first, last = arguments[6:9]
            data = [*map(place, arguments, kinds), arguments[4]]
            length = builder.add(builder.sub(last, first), _INDEX(rows - 1))
            with _for_range(builder, builder.sdiv(length, _INDEX(rows))) as blocks:
                row = builder.add(first, builder.mul(blocks.index, _INDEX(rows)))
                latest = builder.sub(last, _INDEX(rows))
                row = builder.select(builder.icmp_signed("<", row, latest), row, latest)
                total = _sum_groups(builder, decode, data, own, token, row, (rows, tokens))
                for (r, n), vector in total.items():
                    at = builder.mul(builder.add(token, _INDEX(n)), own.rows)
                    out = builder.gep(place(arguments[9], _FLOAT), [builder.add(at, builder.add(row, _INDEX(r)))])
                    builder.store(_total(builder, builder.load(vector)), out)
            return context.get_dummy_value()

        number = types.int64
        numbers = types.UniTuple(number, len(_Sizes._fields))  # type: ignore[no-untyped-call]
        return types.void(*[number] * 5, numbers, *[number] * 4), generate

    return products


def _both(decode: Decode, entry: Any) -> tuple[Any, Any]:
    """`_products` of one token, and of several."""
    return _products(decode, entry, LEAST_ROWS, 1), _products(decode, entry, _FEWER_ROWS, _TOKENS)


_one_two_books, _more_two_books = _both(_two_books, _FLOAT)
_one_any_books, _more_any_books = _both(_any_books, _FLOAT)
_one_e8p, _more_e8p = _both(_e8p, _BYTE)
_one_uniform, _more_uniform = _both(_uniform, _BYTE)
_one_byte, _more_bytes = _both(_whole_bytes, _BYTE)


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
            if kind == _PAIRS:
                _more_two_books(x, tables, codes, weights, setting, sizes, n, first, last, sums)
            elif kind == _SUMS:
                _more_any_books(x, tables, codes, weights, setting, sizes, n, first, last, sums)
            elif kind == _LATTICE:
                _more_e8p(x, tables, codes, weights, setting, sizes, n, first, last, sums)
            elif kind == _NUMBERS:
                _more_uniform(x, tables, codes, weights, setting, sizes, n, first, last, sums)
            else:
                _more_bytes(x, tables, codes, weights, setting, sizes, n, first, last, sums)
        for n in range(fours, tokens):
            if kind == _PAIRS:
                _one_two_books(x, tables, codes, weights, setting, sizes, n, first, last, sums)
            elif kind == _SUMS:
                _one_any_books(x, tables, codes, weights, setting, sizes, n, first, last, sums)
            elif kind == _LATTICE:
                _one_e8p(x, tables, codes, weights, setting, sizes, n, first, last, sums)
            elif kind == _NUMBERS:
                _one_uniform(x, tables, codes, weights, setting, sizes, n, first, last, sums)
            else:
                _one_byte(x, tables, codes, weights, setting, sizes, n, first, last, sums)


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
    kind = _PAIRS if count == 2 else _SUMS
    _multiply(kind, *addresses(*read, sums), entries, tokens, (groups, count, span // count, spans, rows))


def multiply_e8p(x: Tensor, tables: Tensor, codes: Tensor, weights: Tensor, sums: Tensor) -> None:
    """Products with points of E8P in quarters.

    Args:
        x: float32 (N, G, 8).
        tables: int8 (3, 256, 8): patterns by the low byte of a code; bits to flip and what to add then by the high one.
        codes: uint8 (O, G, 2), the low byte first.
        weights: float32 (1, O), scales of the rows.
        sums: float32 (N, O), contiguous, written.
    """
    (tokens, groups, _), (rows, _, count) = x.shape, codes.shape
    read = contiguous(x, tables, codes, weights)
    _multiply(_LATTICE, *addresses(*read, sums), 0, tokens, (groups, count, groups, 1, rows))


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
    read = contiguous(x, codes, codes, weights)  # these have no tables
    kind = _BYTE_NUMBERS if bits == 8 else _NUMBERS
    _multiply(kind, *addresses(*read, sums), bits, tokens, (groups, bits, span, spans, rows))
