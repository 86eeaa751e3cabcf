"""Second moments made symmetric strip by strip, against whole matrices."""

import pytest
import torch

from casp_pl.linalg.moments import in_units, symmetrize_


@pytest.mark.parametrize("size", [1, 9, 1024, 1025, 2051])
def test_strips_give_the_mean_of_both_triangles(size: int) -> None:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    expected, place = (matrix + matrix.T) / 2, matrix.data_ptr()
    symmetric = symmetrize_(matrix)
    assert symmetric.data_ptr() == place
    assert torch.equal(symmetric, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_the_diagonal_becomes_the_unit(dtype: torch.dtype) -> None:
    moment = 37 * torch.rand(11, 11, generator=torch.Generator().manual_seed(0))
    before = moment.clone()
    wide = before.to(torch.float64)
    expected = (wide + wide.T) / 2 / wide.diagonal().mean()
    units = in_units(moment, dtype)
    assert units.dtype == dtype
    torch.testing.assert_close(units.to(torch.float64), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(moment, before), "what is given stays as it is"
    assert torch.equal(in_units(torch.zeros(3, 3), dtype), torch.zeros(3, 3, dtype=dtype))
