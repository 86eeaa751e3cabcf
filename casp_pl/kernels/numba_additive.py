"""Additive weights from their codes, and the gradients back, compiled by numba (optional package; extra `cpu`).

Every weight is written, or read, once, and the codebooks stay in a core's first cache. A thread owns rows; sums over
rows are kept apart for the parts that the caller names, so that results are the same for any number of threads.

Importing this module compiles nothing; the first call does, and numba keeps the result in a cache on disk.

Letters: O out, G groups a row, K codebooks, C entries a codebook, D group length, P parts of the rows.
"""

import numpy as np
from llvmlite import ir
from numba import njit, prange, types

from casp_pl.kernels.llvm_vectors import (
    BYTE,
    CONTRACT,
    FLOATS,
    INDEX,
    WIDTH,
    add_product,
    alloca,
    for_range,
    intrinsic,
    spread,
    sum_of_lanes,
)

__all__ = ["gather", "scatter"]

_FAST = {"contract", "nsz", "reassoc"}


@intrinsic
def _scatter_row(typing_context, codes, codebooks, scale, weight, sums, groups, books, entries):  # type: ignore[no-untyped-def]
    # `scatter` of a row in groups of 8, whose dot is returned; arrays are addresses

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        codes, codebooks, scale, weight, sums, groups, books, entries = arguments
        codes, codebooks, weight, sums = (
            builder.inttoptr(address, kind.as_pointer())
            for address, kind in ((codes, BYTE), (codebooks, FLOATS), (weight, FLOATS), (sums, FLOATS))
        )
        dot, scale = alloca(builder, FLOATS), spread(builder, FLOATS, scale)
        builder.store(ir.Constant(FLOATS, [0.0] * WIDTH), dot)
        with for_range(builder, groups) as row:
            given = builder.load(builder.gep(weight, [row.index]), align=4)
            own = builder.gep(codes, [builder.mul(row.index, books)])
            with for_range(builder, books) as chosen:
                code = builder.zext(builder.load(builder.gep(own, [chosen.index])), INDEX)
                place = builder.add(builder.mul(chosen.index, entries), code)
                entry, total = (builder.gep(table, [place]) for table in (codebooks, sums))
                add_product(builder, dot, given, builder.load(entry, align=4))
                added = builder.fmul(given, scale, flags=CONTRACT)
                builder.store(builder.fadd(builder.load(total, align=4), added, flags=CONTRACT), total, align=4)
        return sum_of_lanes(builder, builder.load(dot))

    number = types.int64
    return types.float32(number, number, types.float32, *[number] * 5), generate


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
            if length == WIDTH:
                dots[o] = _scatter_row(
                    codes[o].ctypes.data, codebooks.ctypes.data, scales[o], weight[o].ctypes.data, own.ctypes.data,
                    groups, books, codebooks.shape[1],
                )  # fmt: skip
                continue
            scale, dot = scales[o], np.float32(0)
            for g in range(groups):
                given = weight[o, g * length : (g + 1) * length]
                for k in range(books):
                    entry, total = codebooks[k, codes[o, g, k]], own[k, codes[o, g, k]]
                    for d in range(length):
                        dot += given[d] * entry[d]
                        total[d] += scale * given[d]
            dots[o] = dot
