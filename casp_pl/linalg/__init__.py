"""Tensor maths on weights and second moments, factorisations in float64."""

from casp_pl.linalg.cholesky import safe_cholesky
from casp_pl.linalg.finite import require_finite
from casp_pl.linalg.losses import proxy_loss, relative_proxy_loss
from casp_pl.linalg.products import GramSum, ProductSum, full_width_matmul, full_width_product, full_width_products
from casp_pl.linalg.propagation import PropagationTarget
from casp_pl.linalg.whitening import WhitenedSVD, low_rank_factors, whitened_spectrum, whitened_svd

__all__ = [
    "GramSum",
    "ProductSum",
    "PropagationTarget",
    "WhitenedSVD",
    "full_width_matmul",
    "full_width_product",
    "full_width_products",
    "low_rank_factors",
    "proxy_loss",
    "relative_proxy_loss",
    "require_finite",
    "safe_cholesky",
    "whitened_spectrum",
    "whitened_svd",
]
