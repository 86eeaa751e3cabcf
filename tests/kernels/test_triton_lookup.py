"""Triton's kernels in its interpreter, and compiled for GPUs that are not here. Each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is installed by `make test` and with torch for CUDA")

_ROOT = Path(__file__).parents[2]

_INTERPRETED = """
import torch
import casp_pl.kernels.additive as additive
import casp_pl.kernels.triton_lookup as triton_lookup
from casp_pl.kernels.compiled import LookupLoop
from casp_pl.kernels.lookup import CodeRows, lookup_reference
from casp_pl.kernels.triton_lookup import gather, lookup

guarded, device_of = [], triton_lookup._device_of
triton_lookup._device_of = lambda tensor: guarded.append(tensor) or device_of(tensor)
additive.gather_loop = lambda tensor: gather

loop = LookupLoop(lookup, lambda codes: codes, tokens=8)
for rows, groups, books, entries, length, spans, tokens in [
    (1, 1, 1, 2, 1, 1, 1), (5, 3, 2, 16, 8, 1, 3), (33, 17, 1, 72, 2, 4, 1), (40, 20, 3, 256, 3, 5, 2),
    (7, 18, 4, 8, 8, 1, 1)]:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, entries, (rows, groups * books), dtype=torch.uint8, generator=generator)
    x = torch.randn(tokens, groups * length, generator=generator)
    codebooks = torch.randn(books, entries, length, generator=generator)
    weights = torch.randn(spans, rows, generator=generator)
    expected = lookup_reference(codes, x.double(), codebooks.double(), weights.double())
    y = CodeRows(codes, loop).multiply(x, codebooks, weights)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert guarded.pop().shape == (tokens, groups, length), "launched on the device of its inputs"

    # the weight, and gradients, which take it apart again
    own, scales = codes.view(rows, groups, books), weights[0, :, None].contiguous()
    results = []
    for dtype, dequantize in ((torch.float32, additive.dequantize_additive),
                              (torch.float64, additive.dequantize_additive_reference)):
        tables = [table.to(dtype).requires_grad_() for table in (codebooks, scales)]
        weight = dequantize(own, *tables)
        results.append([weight.detach().double(), *torch.autograd.grad(weight.square().sum(), tables)])
    assert guarded.pop().shape == results[0][0].shape and not guarded
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
print("passed")
"""

_COMPILED = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from casp_pl.kernels import triton_lookup

numbers = dict.fromkeys(["rows", "groups", "length", "entries", "span"], "i32")
sizes = dict.fromkeys(["BOOKS", "LENGTH", "ROWS", "GROUPS"], "constexpr")
tables = {"books": "*fp32", "codes": "*u8", "weights": "*fp32"}
lookup = (triton_lookup._lookup, {"x": "*fp32", **tables, "sums": "*fp32"})
gather = (triton_lookup._gather, {**tables, "out": "*fp32"})
aqlm = [(1, 8), (2, 8), (3, 8), (4, 8)]  # codebooks, inputs that a code stands for
others = [(1, 2), (1, 1), (1, 4)]  # pairs of E8P, bytes of GPTQ; its 1 bit and the residual of QuIP# are (1, 8)
kernels = [(lookup, shape) for shape in aqlm + others] + [(gather, shape) for shape in aqlm]
for ((kernel, arguments), (books, length)), capability in zip(kernels, itertools.cycle((80, 90))):
    constants = {"BOOKS": books, "LENGTH": length, "ROWS": triton_lookup._ROWS, "GROUPS": triton_lookup._GROUPS}
    source = ASTSource(kernel, {**arguments, **numbers, **sizes}, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f"sm_{capability}" in built.asm["ptx"]
    assert built.asm["cubin"]
print("passed")
"""


@pytest.mark.parametrize(
    ("code", "interpret"), [(_INTERPRETED, "1"), pytest.param(_COMPILED, "0", marks=pytest.mark.slow)]
)
def test_kernels(code: str, interpret: str, tmp_path: Path) -> None:
    environment = {
        **os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "passed\n"
