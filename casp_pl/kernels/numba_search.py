"""Beam search over codebooks as one loop over vectors, compiled by numba (optional package; extra `cpu`).

In torch the search of one group is thirty small operations over all vectors, whose intermediate results leave the
cache. Here one vector at a time passes through all codebooks, its scores in a core's first cache, and threads share the
vectors. A vector's result depends on nothing else, so it is the same for any number of threads.

Importing this module compiles nothing; the first call does, and numba keeps the result in a cache on disk.

Letters: O vectors, K codebooks, C entries a codebook, D group length, B beam width, G groups with norms of their own.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from numba.np.numpy_support import carray
from torch import Tensor

from casp_pl.kernels.llvm_least import STEP, least_score
from casp_pl.kernels.numba_addresses import addresses, contiguous, pointer

__all__ = ["improve", "nearest_entries", "search"]

_VECTORS = 32  # of a piece of work that one thread does
# dtypes of the arguments: tables that are read, codes, and what else is written
_NEAREST = *(torch.float32,) * 3, torch.int64
_SEARCHED = *(torch.float32,) * 4, torch.int64, torch.float32
_IMPROVED = *(torch.float32,) * 5, torch.int64, torch.float32, torch.float32
_FAST = {"contract", "nnan", "nsz", "reassoc"}  # no NaN occurs: inputs are checked before anything is quantized

_ZERO, _ONE, _MINUS_TWO = np.float32(0), np.float32(1), np.float32(-2)  # plain numbers would take it all to float64
_compiled: Any = njit(parallel=True, nogil=True, cache=True, fastmath=_FAST)


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
def _least(rest, table, norms, start, stop, scores):  # type: ignore[no-untyped-def]
    """The smallest of `_score` in a range, and where it stands first.

    Ranges of a vector come in their order: where STEP does not divide them, the one that begins at 0 fills the scores
    (C,) of all entries, and those after it read them.
    """
    length, entries = table.shape
    if (stop - start) % STEP == 0:
        arrays = rest.ctypes.data, table.ctypes.data, norms.ctypes.data
        return least_score(*arrays, length, entries, start, stop)
    if start == 0:
        _score(rest, table, norms, scores)
    least, place = scores[start], start
    for c in range(start + 1, stop):
        if scores[c] < least:
            least, place = scores[c], c
    return least, place


def nearest_entries(linear: Tensor, table: Tensor, norms: Tensor, entries: Tensor) -> None:
    """`nearest_entries` of all groups; see there.

    Args:
        linear: M x, float32 (G, D, O).
        table: a codebook, transposed (D, C).
        norms: c^T M c (G, C).
        entries: int64 (G, O), contiguous, written.
    """
    read = contiguous(linear, table, norms)
    _nearest(*addresses(_NEAREST, *read, entries), (*linear.shape, table.shape[1]))


def search(
    linear: Tensor, tables: Tensor, norms: Tensor, images: Tensor, width: int, codes: Tensor, totals: Tensor
) -> None:
    """`beam_search` of all vectors; see there.

    Args:
        linear: M x, float32 (D, O).
        tables: codebooks, transposed (K, D, C).
        norms: c^T M c (K, C).
        images: M c (K, D, C).
        width: B.
        codes: int64 (K, O), contiguous, written.
        totals: float32 (O,), contiguous, written.
    """
    read = contiguous(linear, tables, norms, images)
    _search(*addresses(_SEARCHED, *read, codes, totals), (*tables.shape, linear.shape[1]), width)


def improve(
    gradient: Tensor,
    scales: Tensor,
    tables: Tensor,
    norms: Tensor,
    images: Tensor,
    width: int,
    codes: Tensor,
    change: Tensor,
    fall: Tensor,
) -> None:
    """`improve_codes` of all vectors; see there.

    Args:
        gradient: float32 (D, O).
        scales: (O,).
        tables: codebooks, transposed (K, D, C).
        norms: c^T M c (K, C).
        images: M c (K, D, C).
        width: B.
        codes: int64 (K, O), contiguous, changed.
        change: float32 (D, O), contiguous, written.
        fall: float32 (O,), contiguous, added to.
    """
    read = contiguous(gradient, scales, tables, norms, images)
    _improve(*addresses(_IMPROVED, *read, codes, change, fall), (*tables.shape, gradient.shape[1]), width)


@_compiled
def _nearest(linear_at, table_at, norms_at, entries_at, sizes):  # type: ignore[no-untyped-def]
    groups, length, vectors, count = sizes
    linear = carray(pointer(linear_at), (groups, length, vectors), np.float32)
    table = carray(pointer(table_at), (length, count), np.float32)
    norms = carray(pointer(norms_at), (groups, count), np.float32)
    entries = carray(pointer(entries_at), (groups, vectors), np.int64)
    pieces = (vectors + _VECTORS - 1) // _VECTORS
    for work in prange(groups * pieces):
        g, piece = work // pieces, work % pieces
        scores, rest = np.empty(count, np.float32), np.empty(length, np.float32)
        for o in range(piece * _VECTORS, min(vectors, (piece + 1) * _VECTORS)):
            for d in range(length):
                rest[d] = linear[g, d, o]
            entries[g, o] = _least(rest, table, norms[g], 0, count, scores)[1]


@njit(inline="always")
def _room(books, length, entries, width):  # type: ignore[no-untyped-def]
    """What a beam needs, for `_beam`: two sets of partial sums, scores, and candidates."""
    runs = min(width, entries)
    rests = np.empty((2, width, length), np.float32)
    totals = np.empty((2, width), np.float32)
    chosen = np.empty((2, width, books), np.int64)
    found, found_at = np.empty(width * runs, np.float32), np.empty(width * runs, np.int64)
    return rests, totals, chosen, np.empty(entries, np.float32), found, found_at


@njit(fastmath=_FAST)
def _beam(tables, norms, images, room, best_codes):  # type: ignore[no-untyped-def]
    """The beam search of the vector that stands first in the room; returns its score, writes its codes (K,)."""
    books, length, entries = tables.shape
    rests, totals, chosen, scores, found, found_at = room
    width = totals.shape[1]
    runs = min(width, entries)
    size = entries // runs
    beams, now = 1, 0
    totals[0, 0] = 0
    for k in range(books - 1):
        then = 1 - now
        for b in range(beams):
            for r in range(runs):
                least, entry = _least(rests[now, b], tables[k], norms[k], r * size, (r + 1) * size, scores)
                found[r * beams + b], found_at[r * beams + b] = least + totals[now, b], entry
        kept = min(width, beams * runs)
        for n in range(kept):
            place = n if kept == beams * runs else np.argmin(found[: beams * runs])
            parent, entry = place % beams, found_at[place]
            totals[then, n] = found[place]
            found[place] = np.inf
            for j in range(k):
                chosen[then, n, j] = chosen[now, parent, j]
            chosen[then, n, k] = entry
            for d in range(length):
                rests[then, n, d] = rests[now, parent, d] - images[k, d, entry]
        now, beams = then, kept
    best, best_total, best_entry = 0, np.float32(np.inf), 0
    for b in range(beams):
        least, entry = _least(rests[now, b], tables[books - 1], norms[books - 1], 0, entries, scores)
        if least + totals[now, b] < best_total:
            best, best_total, best_entry = b, least + totals[now, b], entry
    for j in range(books - 1):
        best_codes[j] = chosen[now, best, j]
    best_codes[books - 1] = best_entry
    return best_total


@_compiled
def _search(linear_at, tables_at, norms_at, images_at, codes_at, totals_at, sizes, width):  # type: ignore[no-untyped-def]
    books, length, entries, vectors = sizes
    linear = carray(pointer(linear_at), (length, vectors), np.float32)
    tables = carray(pointer(tables_at), (books, length, entries), np.float32)
    norms = carray(pointer(norms_at), (books, entries), np.float32)
    images = carray(pointer(images_at), (books, length, entries), np.float32)
    codes = carray(pointer(codes_at), (books, vectors), np.int64)
    totals = carray(pointer(totals_at), (vectors,), np.float32)
    for piece in prange((vectors + _VECTORS - 1) // _VECTORS):
        room, own = _room(books, length, entries, width), np.empty(books, np.int64)
        for o in range(piece * _VECTORS, min(vectors, (piece + 1) * _VECTORS)):
            for d in range(length):
                room[0][0, 0, d] = linear[d, o]
            totals[o] = _beam(tables, norms, images, room, own)
            for k in range(books):
                codes[k, o] = own[k]


@_compiled
def _improve(gradient_at, scales_at, tables_at, norms_at, images_at, codes_at, change_at, fall_at, sizes, width):  # type: ignore[no-untyped-def]
    books, length, entries, vectors = sizes
    gradient = carray(pointer(gradient_at), (length, vectors), np.float32)
    scales = carray(pointer(scales_at), (vectors,), np.float32)
    tables = carray(pointer(tables_at), (books, length, entries), np.float32)
    norms = carray(pointer(norms_at), (books, entries), np.float32)
    images = carray(pointer(images_at), (books, length, entries), np.float32)
    codes = carray(pointer(codes_at), (books, vectors), np.int64)
    change = carray(pointer(change_at), (length, vectors), np.float32)
    fall = carray(pointer(fall_at), (vectors,), np.float32)
    for piece in prange((vectors + _VECTORS - 1) // _VECTORS):
        room, own = _room(books, length, entries, width), np.empty(books, np.int64)
        for o in range(piece * _VECTORS, min(vectors, (piece + 1) * _VECTORS)):
            scale = scales[o]
            inverse = _ONE / scale if scale != 0 else _ZERO
            score = _ZERO
            for d in range(length):
                value = image = _ZERO
                for k in range(books):
                    value += tables[k, d, codes[k, o]]
                    image += images[k, d, codes[k, o]]
                rest = gradient[d, o] * inverse
                score -= value * (image + rest + rest)
                room[0][0, 0, d] = rest + image
            better = _beam(tables, norms, images, room, own) < score
            drop = _ZERO
            for d in range(length):
                step = turn = _ZERO
                if better:
                    for k in range(books):
                        step += tables[k, d, own[k]] - tables[k, d, codes[k, o]]
                        turn += images[k, d, own[k]] - images[k, d, codes[k, o]]
                change[d, o] = scale * step
                drop += scale * step * (gradient[d, o] + gradient[d, o] - scale * turn)
            fall[o] += drop
            if better:
                for k in range(books):
                    codes[k, o] = own[k]
