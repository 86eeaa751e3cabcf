"""Products with codes by look-up, compiled by numba (optional package; extra `cpu`): the heart of decoding on a CPU.

The products of a group of inputs with all entries of a codebook are fewer than the products with all weights; the codes
only choose which of them to add. A thread owns rows, so sums are added in one order whatever the number of threads.
Tables are walked in pieces that stay in a core's first cache, and every piece serves many rows.

Importing this module compiles nothing; the first call does, and numba keeps the result in a cache on disk.

Letters: N tokens, O rows, G groups of inputs, D inputs a group, K codebooks, C entries a codebook, M = G K positions of
a row's codes, S spans of positions, each with scales of its own.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from numba.np.numpy_support import carray
from torch import Tensor

from casp_pl.kernels.numba_addresses import addresses, contiguous, pointer

__all__ = ["lookup", "multiply_group"]

_ROWS = 64  # of a piece of work that one thread does
_FLOATS = 8192  # of a table in a piece: 32 KiB
_DTYPES = torch.float32, torch.float32, torch.uint8, torch.float32, torch.float32  # of x, books, codes, weights, sums
_ZERO = np.float32(0)

_compiled: Any = njit(parallel=True, nogil=True, cache=True)


@njit(inline="always", fastmath=True)
def multiply_group(x, book, products):  # type: ignore[no-untyped-def]
    """products[c] = <x, entry c> with x (D,) and book (D, C). Returns the largest magnitude."""
    length, entries = book.shape
    for c in range(entries):
        products[c] = x[0] * book[0, c]
    for d in range(1, length):
        for c in range(entries):
            products[c] += x[d] * book[d, c]
    largest = _ZERO
    for c in range(entries):
        largest = max(largest, abs(products[c]))
    return largest


def lookup(x: Tensor, books: Tensor, codes: Tensor, weights: Tensor, span: int, sums: Tensor) -> None:
    """sums[n, o] = sum_s weights[s, o] * sum over positions m = (g, k) of span s: <x[n, g], books[k, :, codes[o, m]]>.

    Args:
        x: float32 (N, G, D).
        books: float32 (K, D, C).
        codes: uint8 (O, M), all below C.
        weights: float32 (S, O).
        span: positions of a span; the last may be shorter.
        sums: float32 (N, O), contiguous, written.
    """
    read = contiguous(x, books, codes, weights)
    sizes = (*x.shape, *books.shape[::2], *codes.shape, weights.shape[0])
    _lookup(*addresses(_DTYPES, *read, sums), sizes, span)


@_compiled
def _lookup(x_at, books_at, codes_at, weights_at, sums_at, sizes, span):  # type: ignore[no-untyped-def]
    tokens, groups, length, codebooks, entries, rows, positions, spans = sizes
    x = carray(pointer(x_at), (tokens, groups, length), np.float32)
    books = carray(pointer(books_at), (codebooks, length, entries), np.float32)
    codes = carray(pointer(codes_at), (rows, positions), np.uint8)
    weights = carray(pointer(weights_at), (spans, rows), np.float32)
    sums = carray(pointer(sums_at), (tokens, rows), np.float32)
    tables = np.empty((tokens, positions, entries), dtype=np.float32)
    for work in prange(tokens * groups):
        n, g = work // groups, work % groups
        for k in range(codebooks):
            multiply_group(x[n, g], books[k], tables[n, g * codebooks + k])
    step = max(4, _FLOATS // entries)
    for piece in prange((rows + _ROWS - 1) // _ROWS):
        first, last = piece * _ROWS, min(rows, (piece + 1) * _ROWS)
        for n in range(tokens):
            for o in range(first, last):
                sums[n, o] = _ZERO
        for s in range(spans):
            end = min(positions, (s + 1) * span)
            for start in range(s * span, end, step):
                stop = min(end, start + step)
                whole = start + (stop - start) // 4 * 4
                for n in range(tokens):
                    table = tables[n]
                    for o in range(first, last):
                        row = codes[o]
                        sum0 = sum1 = sum2 = sum3 = _ZERO
                        for m in range(start, whole, 4):  # four sums: the next need not wait for the last
                            sum0 += table[m, row[m]]
                            sum1 += table[m + 1, row[m + 1]]
                            sum2 += table[m + 2, row[m + 2]]
                            sum3 += table[m + 3, row[m + 3]]
                        for m in range(whole, stop):
                            sum0 += table[m, row[m]]
                        sums[n, o] += weights[s, o] * ((sum0 + sum1) + (sum2 + sum3))
