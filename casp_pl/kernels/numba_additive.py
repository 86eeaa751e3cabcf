"""Additive weights from their codes, and the gradients back, compiled by numba (optional package; extra `cpu`).

Every weight is written, or read, once, and the codebooks stay in a core's first cache. A thread owns rows; sums over
rows are kept apart for the parts that the caller names, so that results are the same for any number of threads.

Importing this module compiles nothing; the first call does, and numba keeps the result in a cache on disk.

Letters: O out, G groups a row, K codebooks, C entries a codebook, D group length, P parts of the rows.
"""

import numpy as np
from numba import njit, prange

__all__ = ["gather", "scatter"]

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
def scatter(codes, codebooks, scales, weight, bounds, sums, dots):  # type: ignore[no-untyped-def]
    """The adjoints of `gather`: sums[p, k, c] = sum of scales[o] * weight over that code's groups in part p, and dots.

    Args:
        codes: uint8 (O, G, K), all below C.
        codebooks: float32 (K, C, D).
        scales: float32 (O,).
        weight: float32 (O, G * D).
        bounds: int64 (P + 1,), where the parts begin, and the end of the last one; these are all rows.
        sums: float32 (P, K, C, D), zeros, added to.
        dots: float32 (O,), written: dots[o] = sum over g, d, k of weight[o, g D + d] * codebooks[k, codes[o, g, k], d].
    """
    groups, books = codes.shape[1:]
    length = codebooks.shape[2]
    for part in prange(len(sums)):
        own = sums[part]
        for o in range(bounds[part], bounds[part + 1]):
            scale, dot = scales[o], np.float32(0)
            for g in range(groups):
                given = weight[o, g * length : (g + 1) * length]
                for k in range(books):
                    entry, total = codebooks[k, codes[o, g, k]], own[k, codes[o, g, k]]
                    for d in range(length):
                        dot += given[d] * entry[d]
                        total[d] += scale * given[d]
            dots[o] = dot
