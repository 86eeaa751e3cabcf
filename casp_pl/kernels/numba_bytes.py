"""`numba_lookup` for CPUs with AVX-512 VBMI: tables of bytes that registers hold.

Looked up one by one, a product costs two loads. `vpermi2b` chooses 64 bytes at once out of a table of 128 that two
registers hold. So products become whole numbers of 24 bits, three planes of bytes, and for 64 rows a plane takes two
instructions. Sums of whole numbers are exact; what is lost is the rounding to 24 bits relative to the largest of the
products of 32 positions, float32's own precision.

Bytes are added as words of 16 bits: one sum of the whole words, which may overflow, and one of their high bytes; the
sum of the low bytes is what is left of the first without the second.

numba has no such instruction, so the innermost loop is written in LLVM's own language. Importing this module compiles
nothing; the first call does, and numba keeps the result in a cache on disk.

Letters: those of `numba_lookup`, and T tiles of 128 rows.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from torch import Tensor

from casp_pl.kernels.numba_addresses import addresses, contiguous, pointer
from casp_pl.kernels.numba_lookup import multiply_group

__all__ = ["TILE", "lookup_bytes", "tiles_of"]

TILE = 128  # rows: two registers of codes
_REGISTER = 64  # bytes
_CHUNK = 32  # positions whose tables, 24 KiB, stay in a core's first cache and serve many tiles
_PLANES = 3
_DTYPES = torch.float32, torch.float32, torch.uint8, torch.float32, torch.float32  # of x, books, tiles, weights, sums
_BIAS = np.int32(2**23)  # makes the numbers positive
_LARGEST = np.float32(2**23 - 4)  # room for the roundings of a scale and of a division by it

_BYTES = ir.VectorType(ir.IntType(8), _REGISTER)
_WORDS = ir.VectorType(ir.IntType(16), _REGISTER // 2)
_LONGS = ir.VectorType(ir.IntType(32), _REGISTER // 2)
_FLOATS = ir.VectorType(ir.FloatType(), _REGISTER // 2)
_INDEX = ir.IntType(64)

_compiled: Any = njit(parallel=True, nogil=True, cache=True)
_in_module: Any = cgutils.get_or_insert_function
_on_stack: Any = cgutils.alloca_once_value


def tiles_of(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The layout that `lookup_bytes` reads: codes uint8 (O, M) -> (T, M, 128).

    Byte 2 i of a register belongs to row i and byte 2 i + 1 to row 32 + i, as sums of words come out. Rows that fill
    the last tile have codes of zero.
    """
    rows, positions = codes.shape
    padded = np.zeros((-(-rows // TILE) * TILE, positions), dtype=np.uint8)
    padded[:rows] = codes
    halves = padded.reshape(-1, TILE // _REGISTER, 2, _REGISTER // 2, positions)
    return np.ascontiguousarray(halves.transpose(0, 4, 1, 3, 2)).reshape(-1, positions, TILE)


def _all(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _spread(builder: Any, kind: ir.VectorType, value: Any) -> Any:
    """A vector of one value."""
    first = builder.insert_element(_all(kind, 0), value, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, _all(_LONGS, 0))


def _load(builder: Any, base: Any, offset: Any) -> Any:
    """The register of bytes at an address."""
    place = builder.bitcast(builder.gep(base, [offset]), _BYTES.as_pointer())
    return builder.load(place, align=1, typ=_BYTES)


def _choose(builder: Any, table: list[Any], codes: Any) -> Any:
    """The bytes that 64 codes choose from a table of two registers or of four."""
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    permute = _in_module(builder.module, ir.FunctionType(_BYTES, [_BYTES] * 3), name)
    chosen = [builder.call(permute, [table[i], codes, table[i + 1]]) for i in range(0, len(table), 2)]
    if len(chosen) == 1:
        return chosen[0]
    return builder.select(builder.icmp_signed("<", codes, _all(_BYTES, 0)), chosen[1], chosen[0])


def _add_bytes(builder: Any, tables: Any, codes: Any, count: Any, registers: int) -> list[list[list[Any]]]:
    """The loop over positions. Returns where the sums are: [codes' register][plane][whole words, high bytes]."""
    parts = range(TILE // _REGISTER)
    sums = [[[_on_stack(builder, _all(_WORDS, 0)) for _ in range(2)] for _ in range(_PLANES)] for _ in parts]
    with cgutils.for_range(builder, count) as loop:
        tile = builder.mul(loop.index, _INDEX(TILE))
        own = [_load(builder, codes, builder.add(tile, _INDEX(part * _REGISTER))) for part in parts]
        first = builder.mul(loop.index, _INDEX(_PLANES * registers * _REGISTER))
        for plane in range(_PLANES):
            offsets = [_INDEX((plane * registers + register) * _REGISTER) for register in range(registers)]
            table = [_load(builder, tables, builder.add(first, offset)) for offset in offsets]
            for part in parts:
                words = builder.bitcast(_choose(builder, table, own[part]), _WORDS)
                for place, summand in zip(
                    sums[part][plane], (words, builder.lshr(words, _all(_WORDS, 8))), strict=True
                ):
                    builder.store(builder.add(builder.load(place), summand), place)
    return sums


def _unite(builder: Any, planes: list[list[Any]]) -> list[Any]:
    """Sums of numbers from the sums of their bytes: those of the low bytes of words, and of the high ones."""
    united = [_all(_LONGS, 0), _all(_LONGS, 0)]
    for plane, (whole, high) in enumerate(planes):
        odd = builder.load(high)
        even = builder.sub(builder.load(whole), builder.shl(odd, _all(_WORDS, 8)))
        for half, part in enumerate((even, odd)):
            digits = builder.shl(builder.zext(part, _LONGS), _all(_LONGS, 8 * plane))
            united[half] = builder.add(united[half], digits)
    return united


def _sum_entries(registers: int) -> Any:
    """The innermost loop for tables of `registers` * 64 entries, as a function that numba can call."""

    @intrinsic
    def sum_entries(typing_context, tables, table, codes, code, count, scale, out):  # type: ignore[no-untyped-def]
        # out[row] = scale * sum over `count` positions, at most 256, of the numbers that the codes of a tile choose,
        # without their bias. Tables and codes are flat uint8 and start at `table` and `code`; out is float32 (128,).

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            def data(place: int) -> Any:
                return context.make_array(signature.args[place])(context, builder, arguments[place]).data

            count = arguments[4]
            factor = _spread(builder, _FLOATS, arguments[5])
            bias = builder.mul(builder.trunc(count, ir.IntType(32)), ir.IntType(32)(int(_BIAS)))
            biases = _spread(builder, _LONGS, bias)
            first_table, first_codes = (builder.gep(data(place), [arguments[place + 1]]) for place in (0, 2))
            for part, planes in enumerate(_add_bytes(builder, first_table, first_codes, count, registers)):
                for half, numbers in enumerate(_unite(builder, planes)):
                    value = builder.fmul(builder.sitofp(builder.sub(numbers, biases), _FLOATS), factor)
                    place = builder.gep(data(6), [_INDEX(part * _REGISTER + half * _REGISTER // 2)])
                    builder.store(value, builder.bitcast(place, _FLOATS.as_pointer()), align=4)
            return context.get_dummy_value()

        flat, floats = types.Array(types.uint8, 1, "C"), types.Array(types.float32, 1, "C")
        return types.void(flat, types.int64, flat, types.int64, types.int64, types.float32, floats), generate

    return sum_entries


_sum_of_128, _sum_of_256 = _sum_entries(2), _sum_entries(4)


@njit(inline="always")
def _limits(chunk, span, positions):  # type: ignore[no-untyped-def]
    """The span of a chunk, its first position and the one after its last."""
    inside = (span + _CHUNK - 1) // _CHUNK
    s = chunk // inside
    start = s * span + chunk % inside * _CHUNK
    return s, start, min(positions, start + _CHUNK, (s + 1) * span)


@njit(inline="always")
def _fill(x, books, start, stop, tables):  # type: ignore[no-untyped-def]
    """Write the tables of positions start to stop, uint8 (positions, 3, 128 or 256); returns their scale. x (G, D)."""
    codebooks, _, entries = books.shape
    products = np.empty((_CHUNK, entries), dtype=np.float32)
    largest = np.float32(0)
    for m in range(start, stop):
        largest = max(largest, multiply_group(x[m // codebooks], books[m % codebooks], products[m - start]))
    scale = largest / _LARGEST
    factor = np.float32(1) / scale if scale > 0 else np.float32(0)
    for m in range(start, stop):
        own, table = products[m - start], tables[m]
        low, middle, high = table[0], table[1], table[2]
        for c in range(entries):
            number = np.int32(np.rint(own[c] * factor)) + _BIAS
            low[c] = np.uint8(number & 255)
            middle[c] = np.uint8((number >> 8) & 255)
            high[c] = np.uint8(number >> 16)
    return scale


def lookup_bytes(x: Tensor, books: Tensor, tiles: Tensor, weights: Tensor, span: int, sums: Tensor) -> None:
    """The sums of `numba_lookup.lookup`.

    Args:
        x: float32 (N, G, D), finite.
        books: float32 (K, D, C), at most 256 entries.
        tiles: uint8 (T, M, 128), the codes as `tiles_of` lays them out, all below C.
        weights: float32 (S, O).
        span: positions of a span; the last may be shorter.
        sums: float32 (N, O), contiguous, written.
    """
    read = contiguous(x, books, tiles, weights)
    sizes = (*x.shape, *books.shape[::2], *tiles.shape[:2], *weights.shape)
    _lookup_bytes(*addresses(_DTYPES, *read, sums), sizes, span)


@_compiled
def _lookup_bytes(x_at, books_at, tiles_at, weights_at, sums_at, sizes, span):  # type: ignore[no-untyped-def]
    tokens, groups, length, codebooks, entries, count, positions, spans, rows = sizes
    x = carray(pointer(x_at), (tokens, groups, length), np.float32)
    books = carray(pointer(books_at), (codebooks, length, entries), np.float32)
    codes = carray(pointer(tiles_at), (count * positions * TILE,), np.uint8)
    weights = carray(pointer(weights_at), (spans, rows), np.float32)
    sums = carray(pointer(sums_at), (tokens, rows), np.float32)
    size = TILE if entries <= TILE else 2 * TILE
    chunks = spans * ((span + _CHUNK - 1) // _CHUNK)
    tables = np.empty((tokens, positions, _PLANES, size), dtype=np.uint8)
    scales = np.empty((tokens, chunks), dtype=np.float32)
    for work in prange(tokens * chunks):
        n, chunk = work // chunks, work % chunks
        _, start, stop = _limits(chunk, span, positions)
        scales[n, chunk] = _fill(x[n], books, start, stop, tables[n])
    table = tables.reshape(-1)
    pieces = min(count, max(8, count // 4))  # enough for the threads, and few: each reads all tables
    for piece in prange(pieces):
        first, last = piece * count // pieces, (piece + 1) * count // pieces
        part = np.empty(TILE, dtype=np.float32)
        for n in range(tokens):
            for o in range(first * TILE, min(rows, last * TILE)):
                sums[n, o] = np.float32(0)
        for chunk in range(chunks):
            s, start, stop = _limits(chunk, span, positions)
            if start >= stop:  # the last span may have fewer chunks
                continue
            for n in range(tokens):
                place = (n * positions + start) * _PLANES * size
                for tile in range(first, last):
                    code = (tile * positions + start) * TILE
                    if size == TILE:
                        _sum_of_128(table, place, codes, code, stop - start, scales[n, chunk], part)
                    else:
                        _sum_of_256(table, place, codes, code, stop - start, scales[n, chunk], part)
                    for o in range(min(TILE, rows - tile * TILE)):
                        sums[n, tile * TILE + o] += weights[s, tile * TILE + o] * part[o]
