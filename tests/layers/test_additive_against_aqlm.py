"""Our additive layer against the package aqlm: the same codes and tables are the same weight."""

import warnings

import pytest
import torch

from casp_pl.layers import AdditiveLinear


@pytest.mark.parametrize(("rows", "groups", "codebooks"), [(5, 3, 1), (12, 7, 2), (3, 1, 4)])
def test_the_peer_decodes_our_codes_to_our_weight(rows: int, groups: int, codebooks: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer scripts its decoder with torch.jit, which torch deprecates
        from aqlm.utils import _dequantize_weight, pack_int_data, unpack_int_data

        generator = torch.Generator().manual_seed(rows)
        codes = torch.randint(0, 256, (rows, groups, codebooks), generator=generator)
        tables = torch.randn(codebooks, 256, 8, generator=generator)
        scales = torch.rand(rows, 1, generator=generator) + 0.1
        layer = AdditiveLinear.from_codes(codes, tables, scales, in_features=8 * groups)
        stored = pack_int_data(layer.codes_unpacked().long(), 8)  # the peer's files hold signed bytes
        weight = _dequantize_weight(unpack_int_data(stored, 8), tables[:, :, None], scales[:, None, None])
    torch.testing.assert_close(layer.dequantize().detach(), weight)
