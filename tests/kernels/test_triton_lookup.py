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
from casp_pl.kernels.compiled import LookupLoop
from casp_pl.kernels.lookup import CodeRows, lookup_reference
from casp_pl.kernels.triton_lookup import dequantize, lookup

loop = LookupLoop(lookup, lambda codes: codes, tokens=8)
for rows, groups, books, entries, length, spans, tokens in [
    (1, 1, 1, 2, 1, 1, 1), (5, 3, 2, 16, 8, 1, 3), (33, 17, 1, 72, 2, 4, 1), (40, 20, 3, 256, 3, 5, 2)]:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, entries, (rows, groups * books), dtype=torch.uint8, generator=generator)
    x = torch.randn(tokens, groups * length, generator=generator)
    codebooks = torch.randn(books, entries, length, generator=generator)
    weights = torch.randn(spans, rows, generator=generator)
    expected = lookup_reference(codes, x.double(), codebooks.double(), weights.double())
    y = CodeRows(codes, loop).multiply(x, codebooks, weights)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    weight = dequantize(codebooks, codes, weights, -(-groups * books // spans))
    torch.testing.assert_close(x.double() @ weight.double().T, expected, rtol=1e-5, atol=1e-5)
print("passed")
"""

_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from casp_pl.kernels import triton_lookup

numbers = dict.fromkeys(["rows", "groups", "length", "entries", "span"], "i32")
sizes = dict.fromkeys(["BOOKS", "LENGTH", "ROWS", "GROUPS"], "constexpr")
tables = {"books": "*fp32", "codes": "*u8", "weights": "*fp32"}
kernels = [(triton_lookup._lookup, {"x": "*fp32", **tables, "sums": "*fp32"}),
           (triton_lookup._dequantize, {**tables, "out": "*fp32"})]
for kernel, arguments in kernels:
    for capability in (80, 90):
        source = ASTSource(kernel, {**arguments, **numbers, **sizes},
                           constexprs={"BOOKS": 2, "LENGTH": 8, "ROWS": 32, "GROUPS": 16})
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert f"sm_{capability}" in built.asm["ptx"]
        assert built.asm["cubin"]
print("passed")
"""


@pytest.mark.parametrize(("code", "interpret"), [(_INTERPRETED, "1"), (_COMPILED, "0")])
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
