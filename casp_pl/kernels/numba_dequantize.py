"""Rows of a weight from the codes as they are packed, compiled by numba (optional package; extra `cpu`).

Nothing that is larger than the codes is kept between two products: a weight is written once, tile by tile, and read by
the matrix product while it lies in a cache. A thread owns rows, so results are the same for any number of threads.

Importing this module compiles nothing; the first call does, and numba keeps the result in a cache on disk.

Letters: O out, I in, G groups a row.
"""

import numpy as np
from numba import njit, prange

__all__ = ["AHEAD", "uniform_weight"]

AHEAD = 8  # bytes behind the last code that `uniform_weight` may read
_UNIT = 8  # codes that fill whole bytes
_NARROW = 4  # bits; eight codes of so many fit into 32, which vectors shift twice as many of at once as of 64
_FAST = {"contract", "nsz"}


@njit(parallel=True, nogil=True, cache=True, fastmath=_FAST)
def uniform_weight(packed, bits, zeros, scales, size, weight):  # type: ignore[no-untyped-def]
    """weight[o, i] = (code[o, i] - zeros[o, g]) * scales[o, g], g = i // size.

    Args:
        packed: uint8, the codes (O, I) as one stream of bits, and AHEAD bytes more. 8 divides I.
        bits: of a code, 1 to 8.
        zeros: float32 (O, G).
        scales: float32 (O, G).
        size: columns of a group, a multiple of 8.
        weight: float32 (O, I), written.
    """
    rows, columns = weight.shape
    units, row_bytes = columns // _UNIT, columns // _UNIT * bits
    narrow, wide = np.uint32((1 << bits) - 1), np.uint64((1 << bits) - 1)
    for o in prange(rows):
        own = weight[o]
        for g in range(zeros.shape[1]):
            zero, scale = zeros[o, g], scales[o, g]
            for unit in range(g * size // _UNIT, min((g + 1) * size // _UNIT, units)):
                at, first = o * row_bytes + unit * bits, unit * _UNIT
                if bits <= _NARROW:
                    word = np.uint32(0)
                    for byte in range(4):
                        word |= np.uint32(packed[at + byte]) << np.uint32(8 * byte)
                    for j in range(_UNIT):
                        code = np.int32((word >> np.uint32(bits * j)) & narrow)
                        own[first + j] = (np.float32(code) - zero) * scale
                else:
                    long = np.uint64(0)
                    for byte in range(8):
                        long |= np.uint64(packed[at + byte]) << np.uint64(8 * byte)
                    for j in range(_UNIT):
                        code = np.int32((long >> np.uint64(bits * j)) & wide)
                        own[first + j] = (np.float32(code) - zero) * scale
