"""Additive weights from their codes, and the gradients back, compiled by numba (optional package; extra `cpu`).

Every weight is written, or read, once, and the codebooks stay in a core's first cache. A thread owns rows; sums over
rows are kept apart for a fixed number of pieces, so that results are the same for any number of threads.

Importing this module compiles nothing; the first call does, and numba keeps the result in a cache on disk.

Letters: O out, G groups a row, K codebooks, C entries a codebook, D group length.
"""

import numpy as np
from numba import njit, prange

__all__ = ["gather", "scatter"]

_PIECES = 16
_FAST = {"contract", "nsz", "reassoc"}


@njit(parallel=True, nogil=True, cache=True, fastmath=_FAST)
def gather(codes, codebooks, scales, weight):  # type: ignore[no-untyped-def]
    """weight[o, g D + d] = scales[o] * sum_k codebooks[k, codes[o, g, k], d].

    Args:
        codes: uint8 (O, G, K), all below C.
        codebooks: float32 (K, C, D).
        scales: float32 (O,).
        weight: float32 (O, G * D), written.
    """
    rows, groups, books = codes.shape
    length = codebooks.shape[2]
    for o in prange(rows):
        scale = scales[o]
        for g in range(groups):
            out = weight[o, g * length : (g + 1) * length]
            first = codebooks[0, codes[o, g, 0]]
            if books == 2:
                second = codebooks[1, codes[o, g, 1]]
                for d in range(length):
                    out[d] = scale * (first[d] + second[d])
            else:
                for d in range(length):
                    out[d] = first[d]
                for k in range(1, books):
                    entry = codebooks[k, codes[o, g, k]]
                    for d in range(length):
                        out[d] += entry[d]
                for d in range(length):
                    out[d] *= scale


@njit(parallel=True, nogil=True, cache=True, fastmath=_FAST)
def scatter(codes, codebooks, scales, weight, sums, dots):  # type: ignore[no-untyped-def]
    """The adjoints of `gather`: sums[k, c] = sum of scales[o] * weight over groups with that code, and dots with rows.

    Args:
        codes: uint8 (O, G, K), all below C.
        codebooks: float32 (K, C, D).
        scales: float32 (O,).
        weight: float32 (O, G * D).
        sums: float32 (K, C, D), written.
        dots: float32 (O,), written: dots[o] = sum over g, d, k of weight[o, g D + d] * codebooks[k, codes[o, g, k], d].
    """
    rows, groups, books = codes.shape
    entries, length = codebooks.shape[1:]
    parts = np.zeros((_PIECES, books, entries, length), dtype=np.float32)
    for piece in prange(_PIECES):
        own = parts[piece]
        for o in range(piece * rows // _PIECES, (piece + 1) * rows // _PIECES):
            scale, dot = scales[o], np.float32(0)
            for g in range(groups):
                given = weight[o, g * length : (g + 1) * length]
                for k in range(books):
                    entry, total = codebooks[k, codes[o, g, k]], own[k, codes[o, g, k]]
                    for d in range(length):
                        dot += given[d] * entry[d]
                        total[d] += scale * given[d]
            dots[o] = dot
    sums[:] = 0
    for piece in range(_PIECES):
        sums += parts[piece]
