"""The loop for AVX-512 VBMI on a CPU without it: its one instruction done by loads, all around it as it is.

Its products, and that 400 calls with two threads give the bits of one thread.
"""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import numba
import torch
from llvmlite import ir
from numba.core import cgutils

import casp_pl.kernels.numba_bytes as numba_bytes
from casp_pl.kernels.lookup import lookup_reference

BYTE = ir.IntType(8)


def choose(builder, table, codes):
    registers = ir.ArrayType(codes.type, len(table))
    entries, chosen = cgutils.alloca_once(builder, registers), cgutils.alloca_once(builder, codes.type)
    for number, register in enumerate(table):
        builder.store(register, cgutils.gep_inbounds(builder, entries, 0, number), align=1)
    codes = cgutils.alloca_once_value(builder, codes)
    entries, chosen_bytes, codes = (builder.bitcast(place, BYTE.as_pointer()) for place in (entries, chosen, codes))
    with cgutils.for_range(builder, ir.IntType(64)(64)) as lanes:
        code = builder.and_(builder.load(builder.gep(codes, [lanes.index])), BYTE(64 * len(table) - 1))
        entry = builder.load(builder.gep(entries, [builder.zext(code, ir.IntType(64))]))
        builder.store(entry, builder.gep(chosen_bytes, [lanes.index]))
    return builder.load(chosen)


numba_bytes._choose = choose
# rows, groups, codebooks, entries, group length, spans, tokens
for rows, groups, books, entries, length, spans, tokens in (
    (1, 1, 1, 2, 1, 1, 1), (130, 9, 1, 4, 2, 9, 2), (65, 40, 2, 256, 8, 3, 1), (300, 33, 1, 128, 3, 2, 3),
    (129, 300, 1, 200, 8, 1, 1),
):
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, entries, (rows, groups * books), generator=generator, dtype=torch.uint8)
    x = torch.randn(tokens, groups * length, generator=generator)
    codebooks, weights = (torch.randn(*s, generator=generator) for s in ((books, entries, length), (spans, rows)))
    expected = lookup_reference(codes, x.double(), codebooks.double(), weights.double())
    sums, tiles = torch.empty(tokens, rows), torch.from_numpy(numba_bytes.tiles_of(codes.numpy()))
    span = -(-groups * books // spans)
    numba_bytes.lookup_bytes(x.view(tokens, groups, length), codebooks.mT.contiguous(), tiles, weights, span, sums)
    worst = float((sums - expected).abs().max() / expected.abs().max())
    assert worst < 2e-6, (rows, worst)
    for threads in [1] + [2] * 400 if tokens == 3 and numba.config.NUMBA_NUM_THREADS > 1 else []:
        numba.set_num_threads(threads)
        again = torch.empty_like(sums)
        numba_bytes.lookup_bytes(x.view(tokens, groups, length), codebooks.mT.contiguous(), tiles, weights, span, again)
        assert torch.equal(again, sums), "a race"
"""


def test_products_are_those_of_the_formula(tmp_path: Path) -> None:
    """In a process and with a cache of its own: what is compiled here is not what belongs to this source."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
