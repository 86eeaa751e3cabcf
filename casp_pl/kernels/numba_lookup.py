"""Sums of table entries that codes choose, compiled by numba (optional package; extra `cpu`): the heart of decoding.

A thread owns rows, so sums are added in one order whatever the number of threads. Tables are walked in pieces that stay
in a core's first cache, and every piece serves many rows.

Importing this module compiles nothing; the first call does, and numba keeps the result in a cache on disk.

Letters: N tokens, O rows, M positions of a row's codes, C entries of a position.
"""

import numpy as np
from numba import njit, prange

__all__ = ["lookup"]

_ROWS = 64  # of a piece of work that one thread does
_FLOATS = 8192  # of a table in a piece: 32 KiB
_ZERO = np.float32(0)


@njit(parallel=True, nogil=True, cache=True)
def lookup(tables, codes, sums):  # type: ignore[no-untyped-def]
    """sums[n, o] = sum_m tables[n, m, codes[o, m]].

    Args:
        tables: float32 (N, M, C).
        codes: uint8 (O, M), all below C.
        sums: float32 (N, O), written.
    """
    tokens, positions, entries = tables.shape
    rows = codes.shape[0]
    step = max(4, _FLOATS // entries)
    for piece in prange((rows + _ROWS - 1) // _ROWS):
        first, last = piece * _ROWS, min(rows, (piece + 1) * _ROWS)
        for n in range(tokens):
            for o in range(first, last):
                sums[n, o] = _ZERO
        for start in range(0, positions, step):
            stop = min(positions, start + step)
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
                    sums[n, o] += (sum0 + sum1) + (sum2 + sum3)
