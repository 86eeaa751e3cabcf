"""The inverse in place against torch's."""

import pytest
import torch

from casp_pl.linalg.triangular import invert_lower_


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 1300])
def test_the_inverse_takes_the_place_of_the_matrix(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    lower = torch.randn(size, size, generator=generator, dtype=torch.float64).tril_().div_(size)
    lower.diagonal().abs_().add_(1)
    for layout in (lower.clone(), lower.mT.clone().mT):  # by rows, and by columns as LAPACK leaves a factor
        expected, place = torch.linalg.inv(layout), layout.data_ptr()
        inverse = invert_lower_(layout)
        assert inverse.data_ptr() == place
        torch.testing.assert_close(inverse, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(inverse, inverse.tril())
