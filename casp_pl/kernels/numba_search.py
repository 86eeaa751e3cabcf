"""Beam search over codebooks as one loop over vectors, compiled by numba (optional package; extra `cpu`).

In torch the search of one group is thirty small operations over all vectors, whose intermediate results leave the
cache. Here one vector at a time passes through all codebooks, its scores in a core's first cache, and threads share the
vectors. A vector's result depends on nothing else, so it is the same for any number of threads.

Importing this module compiles nothing; the first call does, and numba keeps the result in a cache on disk.

Letters: O vectors, K codebooks, C entries a codebook, D group length, B beam width.
"""

import numpy as np
from numba import njit, prange

__all__ = ["search"]

_VECTORS = 32  # of a piece of work that one thread does
_FAST = {"contract", "nnan", "nsz", "reassoc"}  # no NaN occurs: inputs are checked before anything is quantized

_MINUS_TWO = np.float32(-2)  # a plain -2 would take the products to float64


@njit(inline="always", fastmath=_FAST)
def _score(rest, table, norms, scores):  # type: ignore[no-untyped-def]
    """scores_c = norms_c - 2 <rest, c> for all entries; table (D, C). Four coordinates at a time: half the loads."""
    length, entries = table.shape
    for c in range(entries):
        scores[c] = norms[c]
    whole = length // 4 * 4
    for d in range(0, whole, 4):
        r0, r1, r2, r3 = (
            _MINUS_TWO * rest[d],
            _MINUS_TWO * rest[d + 1],
            _MINUS_TWO * rest[d + 2],
            _MINUS_TWO * rest[d + 3],
        )
        t0, t1, t2, t3 = table[d], table[d + 1], table[d + 2], table[d + 3]
        for c in range(entries):
            scores[c] += r0 * t0[c] + r1 * t1[c] + r2 * t2[c] + r3 * t3[c]
    for d in range(whole, length):
        r0, t0 = _MINUS_TWO * rest[d], table[d]
        for c in range(entries):
            scores[c] += r0 * t0[c]


@njit(inline="always", fastmath=_FAST)
def _smallest(scores, start, stop):  # type: ignore[no-untyped-def]
    """The smallest score of a range. Four running minima: the next need not wait for the last."""
    least0 = least1 = least2 = least3 = scores[start]
    whole = start + (stop - start) // 4 * 4
    for c in range(start, whole, 4):
        least0 = scores[c] if scores[c] < least0 else least0
        least1 = scores[c + 1] if scores[c + 1] < least1 else least1
        least2 = scores[c + 2] if scores[c + 2] < least2 else least2
        least3 = scores[c + 3] if scores[c + 3] < least3 else least3
    for c in range(whole, stop):
        least0 = scores[c] if scores[c] < least0 else least0
    return min(min(least0, least1), min(least2, least3))


@njit(inline="always")
def _first(scores, start, stop, value):  # type: ignore[no-untyped-def]
    """Where the value stands first in a range; its last place if it does not."""
    place = start
    while place < stop - 1 and scores[place] != value:
        place += 1
    return place


@njit(parallel=True, nogil=True, cache=True, fastmath=_FAST)
def search(linear, tables, norms, images, width, codes, totals):  # type: ignore[no-untyped-def]
    """`beam_search` of all vectors; see there.

    Args:
        linear: M x, float32 (D, O).
        tables: codebooks, transposed (K, D, C).
        norms: c^T M c (K, C).
        images: M c (K, D, C).
        width: B.
        codes: int64 (K, O), written.
        totals: float32 (O,), written.
    """
    books, length, entries = tables.shape
    vectors = linear.shape[1]
    runs = min(width, entries)
    size = entries // runs
    for piece in prange((vectors + _VECTORS - 1) // _VECTORS):
        scores = np.empty(entries, np.float32)
        rest, next_rest = np.empty((width, length), np.float32), np.empty((width, length), np.float32)
        total, next_total = np.empty(width, np.float32), np.empty(width, np.float32)
        chosen, next_chosen = np.empty((width, books), np.int64), np.empty((width, books), np.int64)
        found, found_at = np.empty(width * runs, np.float32), np.empty(width * runs, np.int64)
        for o in range(piece * _VECTORS, min(vectors, (piece + 1) * _VECTORS)):
            beams = 1
            total[0] = 0
            for d in range(length):
                rest[0, d] = linear[d, o]
            for k in range(books - 1):
                for b in range(beams):
                    _score(rest[b], tables[k], norms[k], scores)
                    for r in range(runs):
                        least = _smallest(scores, r * size, (r + 1) * size)
                        found[r * beams + b] = least + total[b]
                        found_at[r * beams + b] = _first(scores, r * size, (r + 1) * size, least)
                kept = min(width, beams * runs)
                for n in range(kept):
                    place = n if kept == beams * runs else np.argmin(found[: beams * runs])
                    parent, entry = place % beams, found_at[place]
                    next_total[n] = found[place]
                    found[place] = np.inf
                    for j in range(k):
                        next_chosen[n, j] = chosen[parent, j]
                    next_chosen[n, k] = entry
                    for d in range(length):
                        next_rest[n, d] = rest[parent, d] - images[k, d, entry]
                rest, next_rest = next_rest, rest
                total, next_total = next_total, total
                chosen, next_chosen = next_chosen, chosen
                beams = kept
            best, best_total, best_entry = 0, np.float32(np.inf), 0
            for b in range(beams):
                _score(rest[b], tables[books - 1], norms[books - 1], scores)
                least = _smallest(scores, 0, entries)
                if least + total[b] < best_total:
                    best, best_total = b, least + total[b]
                    best_entry = _first(scores, 0, entries, least)
            for j in range(books - 1):
                codes[j, o] = chosen[best, j]
            codes[books - 1, o] = best_entry
            totals[o] = best_total
