"""Vectors of eight floats in LLVM's own language: numba does not keep vectors in registers by itself.

LLVM has them on every CPU; what a function here is given first is its builder. numba's cache on disk knows a loop by
the file that it stands in: after a change here, or in `llvm_least`, empty the __pycache__ of this folder.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

__all__ = [
    "BYTE",
    "BYTES",
    "FLOAT",
    "FLOATS",
    "INDEX",
    "INT",
    "INTS",
    "WIDTH",
    "CONTRACT",
    "add_product",
    "alloca",
    "for_range",
    "intrinsic",
    "load",
    "spread",
    "sum_of_lanes",
]

WIDTH = 8
INDEX, INT, BYTE, FLOAT = ir.IntType(64), ir.IntType(32), ir.IntType(8), ir.FloatType()
FLOATS, INTS, BYTES = (ir.VectorType(kind, WIDTH) for kind in (FLOAT, INT, BYTE))
CONTRACT = ("contract",)  # a product and a sum may become one instruction

intrinsic: Any = _intrinsic  # what it makes is called with one argument less than mypy believes
for_range: Any = cgutils.for_range
alloca: Any = cgutils.alloca_once


def spread(builder: Any, kind: ir.VectorType, value: Any) -> Any:
    """A vector of one value."""
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, INT(0))
    return builder.shuffle_vector(first, first, ir.Constant(INTS, [0] * WIDTH))


def load(builder: Any, kind: Any, base: Any, offset: Any) -> Any:
    """A value of some type behind an offset in elements of the base."""
    return builder.load(builder.bitcast(builder.gep(base, [offset]), kind.as_pointer()), align=1, typ=kind)


def add_product(builder: Any, place: Any, left: Any, right: Any) -> None:
    """A vector in memory, which LLVM keeps in a register, grows by a product."""
    product = builder.fmul(left, right, flags=CONTRACT)
    builder.store(builder.fadd(builder.load(place), product, flags=CONTRACT), place)


def sum_of_lanes(builder: Any, vector: Any) -> Any:
    """The sum of eight floats, in pairs."""
    parts = [builder.extract_element(vector, INT(lane)) for lane in range(WIDTH)]
    while len(parts) > 1:
        parts = [builder.fadd(left, right) for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
