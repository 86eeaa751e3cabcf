"""Near points of E8P, one vector at a time, compiled by numba (optional package; extra `cpu`).

`casp_pl.kernels.lattice_nearest` has the formula. Here a vector meets all 256 patterns while they and its scores lie in
a core's first cache; torch moves the scores of many vectors through memory a dozen times. A vector's result depends on
nothing else, so it is the same for any number of threads.

Importing this module compiles nothing; the first call does, and numba keeps the result in a cache on disk.

Letters: N vectors, P = 256 patterns in the order of their runs, R runs, K = 2 R candidates.
"""

import numpy as np
from numba import njit, prange

__all__ = ["candidates", "nearest"]

_VECTORS = 64  # of a piece of work that one thread does
_FAST = {"contract", "nnan", "nsz", "reassoc"}  # no NaN occurs: inputs are checked before anything is quantized
_QUARTER = np.float32(0.25)
_TWO, _FOUR = np.float32(2), np.float32(4)


@njit(inline="always", fastmath=_FAST)
def _score(size, patterns, norms, parity, odd, scores):  # type: ignore[no-untyped-def]
    """scores_p = |a|^2 - 2 <a, |z|> + 4 [parity differs] min_i a_i |z_i|; size is |z| (8,), patterns (8, P)."""
    z0, z1, z2, z3, z4, z5, z6, z7 = size[0], size[1], size[2], size[3], size[4], size[5], size[6], size[7]
    for p in range(patterns.shape[1]):
        a0, a1, a2, a3 = patterns[0, p] * z0, patterns[1, p] * z1, patterns[2, p] * z2, patterns[3, p] * z3
        a4, a5, a6, a7 = patterns[4, p] * z4, patterns[5, p] * z5, patterns[6, p] * z6, patterns[7, p] * z7
        least = min(min(min(a0, a1), min(a2, a3)), min(min(a4, a5), min(a6, a7)))
        product = ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7))
        scores[p] = norms[p] - _TWO * product + _FOUR * abs(parity[p] - odd) * least


@njit(inline="always", fastmath=_FAST)
def _first_smallest(scores, start, stop):  # type: ignore[no-untyped-def]
    least = scores[start]
    for p in range(start, stop):
        least = min(least, scores[p])
    place = start
    while scores[place] != least and place < stop - 1:  # a NaN equals nothing
        place += 1
    return place


@njit(inline="always", fastmath=_FAST)
def _candidates(x, patterns, norms, parity, numbers, runs, scores, size, found, values):  # type: ignore[no-untyped-def]
    """Codes of the candidates of x (8,) and their points (K, 8)."""
    length = patterns.shape[1] // runs
    for bit in range(2):
        shift = _QUARTER if bit == 0 else -_QUARTER
        signs, odd = 0, np.float32(0)
        for i in range(8):
            z = x[i] - shift
            size[i] = abs(z)
            if z < 0:
                signs |= 1 << i
                odd = np.float32(1) - odd
        _score(size, patterns, norms, parity, odd, scores)
        for run in range(runs):
            p = _first_smallest(scores, run * length, (run + 1) * length)
            turned = signs
            if parity[p] != odd:
                cheapest, least = 0, patterns[0, p] * size[0]
                for i in range(1, 8):
                    if patterns[i, p] * size[i] < least:
                        cheapest, least = i, patterns[i, p] * size[i]
                turned ^= 1 << cheapest
            k = bit * runs + run
            found[k] = numbers[p] | (turned & 127) << 8 | bit << 15
            for i in range(8):
                values[k, i] = (-patterns[i, p] if turned >> i & 1 else patterns[i, p]) + shift


@njit(parallel=True, nogil=True, cache=True)
def candidates(x, patterns, norms, parity, numbers, runs, codes):  # type: ignore[no-untyped-def]
    """The nearest point of each run of patterns for each shift.

    Args:
        x: float32 (8, N).
        patterns: float32 (8, P), runs one after the other.
        norms: float32 (P,), |a|^2.
        parity: float32 (P,), 1 where a pattern asks for an odd number of minus signs.
        numbers: int64 (P,), of the patterns in a code.
        runs: R.
        codes: int64 (K, N), written.
    """
    count = x.shape[1]
    for piece in prange((count + _VECTORS - 1) // _VECTORS):
        scores, size = np.empty(patterns.shape[1], np.float32), np.empty(8, np.float32)
        found, values = np.empty(2 * runs, np.int64), np.empty((2 * runs, 8), np.float32)
        vector = np.empty(8, np.float32)
        for n in range(piece * _VECTORS, min(count, (piece + 1) * _VECTORS)):
            for i in range(8):
                vector[i] = x[i, n]
            _candidates(vector, patterns, norms, parity, numbers, runs, scores, size, found, values)
            for k in range(2 * runs):
                codes[k, n] = found[k]


@njit(parallel=True, nogil=True, cache=True, fastmath=_FAST)
def nearest(x, metric, patterns, norms, parity, numbers, runs, codes, rest):  # type: ignore[no-untyped-def]
    """The best of the candidates in a metric.

    Args:
        x: float32 (8, N).
        metric: float32 (8, 8), symmetric and positive definite.
        patterns: as those of `candidates`, like the next four.
        norms: likewise.
        parity: likewise.
        numbers: likewise.
        runs: likewise.
        codes: int64 (N,), written.
        rest: float32 (8, N), written: x minus the points.
    """
    count = x.shape[1]
    for piece in prange((count + _VECTORS - 1) // _VECTORS):
        scores, size = np.empty(patterns.shape[1], np.float32), np.empty(8, np.float32)
        found, values = np.empty(2 * runs, np.int64), np.empty((2 * runs, 8), np.float32)
        vector, left = np.empty(8, np.float32), np.empty(8, np.float32)
        for n in range(piece * _VECTORS, min(count, (piece + 1) * _VECTORS)):
            for i in range(8):
                vector[i] = x[i, n]
            _candidates(vector, patterns, norms, parity, numbers, runs, scores, size, found, values)
            best, lowest = 0, np.float32(np.inf)
            for k in range(2 * runs):
                for i in range(8):
                    left[i] = vector[i] - values[k, i]
                cost = np.float32(0)
                for i in range(8):
                    image = np.float32(0)
                    for j in range(8):
                        image += metric[i, j] * left[j]
                    cost += image * left[i]
                if cost < lowest:
                    best, lowest = k, cost
            codes[n] = found[best]
            for i in range(8):
                rest[i, n] = vector[i] - values[best, i]
