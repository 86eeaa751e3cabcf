"""The smallest of many scores and its place, by vectors: numba finds a minimum so, but not where it stands.

Letters: C entries, D group length.
"""

from typing import Any

from llvmlite import ir
from numba import types

from casp_pl.kernels.llvm_vectors import (
    CONTRACT,
    FLOAT,
    FLOATS,
    INDEX,
    INT,
    INTS,
    WIDTH,
    alloca,
    for_range,
    intrinsic,
    load,
    spread,
)

__all__ = ["STEP", "least_score"]

_VECTORS = 4  # of scores that are made at once: a coordinate of the vector is loaded once for all
STEP = _VECTORS * WIDTH


class _Least:
    """Running minima of every lane, and where they stand."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self._values, self._places = alloca(builder, FLOATS), alloca(builder, INTS)
        builder.store(ir.Constant(FLOATS, [float("inf")] * WIDTH), self._values)
        builder.store(ir.Constant(INTS, [0] * WIDTH), self._places)

    def take(self, scores: Any, places: Any) -> None:
        """Look at one score more in every lane; of equal ones the first stays."""
        builder = self._builder
        values, own = builder.load(self._values), builder.load(self._places)
        smaller = builder.fcmp_ordered("<", scores, values)
        builder.store(builder.select(smaller, scores, values), self._values)
        builder.store(builder.select(smaller, places, own), self._places)

    def first(self) -> tuple[Any, Any]:
        """The smallest of all lanes and its place; of equal ones the first place."""
        builder = self._builder
        values, places = builder.load(self._values), builder.load(self._places)
        lanes = [tuple(builder.extract_element(part, INT(lane)) for part in (values, places)) for lane in range(WIDTH)]
        (value, place), *others = lanes
        for own, here in others:
            equal = builder.and_(builder.fcmp_ordered("==", own, value), builder.icmp_signed("<", here, place))
            better = builder.or_(builder.fcmp_ordered("<", own, value), equal)
            value, place = builder.select(better, own, value), builder.select(better, here, place)
        return value, place


@intrinsic
def least_score(typing_context, rest, table, norms, length, entries, start, stop):  # type: ignore[no-untyped-def]
    """Inside compiled code: the smallest norms_c - 2 <rest, c> of the entries from start to stop, and its place.

    Addresses of float32: rest (D,), table (D, C) and norms (C,); then D, C and the range, whose length STEP divides.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        rest, table, norms = (builder.inttoptr(address, FLOAT.as_pointer()) for address in arguments[:3])
        length, entries, start, stop = arguments[3:]
        least, scores = _Least(builder), [alloca(builder, FLOATS) for _ in range(_VECTORS)]
        with for_range(builder, builder.sdiv(builder.sub(stop, start), INDEX(STEP))) as blocks:
            at = builder.add(start, builder.mul(blocks.index, INDEX(STEP)))
            own = [builder.add(at, INDEX(number * WIDTH)) for number in range(_VECTORS)]
            for score, place in zip(scores, own, strict=True):
                half = builder.fmul(load(builder, FLOATS, norms, place), ir.Constant(FLOATS, [0.5] * WIDTH))
                builder.store(half, score)
            with for_range(builder, length) as coordinates:
                factor = spread(builder, FLOATS, builder.load(builder.gep(rest, [coordinates.index])))
                row = builder.mul(coordinates.index, entries)
                for score, place in zip(scores, own, strict=True):
                    part = load(builder, FLOATS, table, builder.add(row, place))
                    product = builder.fmul(factor, part, flags=CONTRACT)
                    builder.store(builder.fsub(builder.load(score), product, flags=CONTRACT), score)
            for score, place in zip(scores, own, strict=True):
                lanes = ir.Constant(INTS, list(range(WIDTH)))
                places = builder.add(spread(builder, INTS, builder.trunc(place, INT)), lanes)
                least.take(builder.load(score), places)
        value, place = least.first()
        pair = builder.fmul(value, FLOAT(2.0)), builder.sext(place, INDEX)
        return context.make_tuple(builder, signature.return_type, pair)

    number = types.int64
    result = types.Tuple((types.float32, types.int64))  # type: ignore[no-untyped-call]
    return result(*[number] * 7), generate
