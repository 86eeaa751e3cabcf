"""AQLM: additive quantization of a layer's weight, fitted to the layer's outputs (arXiv 2401.06118).

Letters: O out, I in, G groups a row, K codebooks, C entries a codebook, D group length, N rows of a sample.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from casp_pl.errors import ConfigError
from casp_pl.kernels.additive import AdditiveIndex
from casp_pl.layers.additive import AdditiveLinear
from casp_pl.linalg.cholesky import safe_cholesky
from casp_pl.linalg.codebook_cg import CodebookFit, decoded_fit, fit_codebooks
from casp_pl.linalg.kmeans import assign_entries, metric_kmeans
from casp_pl.quantizers.additive_codes import conditional_metrics, feedback_codes, sweep_codes
from casp_pl.quantizers.additive_formats import LEVELS, MAX_GROUP_LENGTH, AdditiveFormat, choose_format
from casp_pl.quantizers.base import Quantizer

__all__ = ["AQLMQuantizer"]


class AQLMQuantizer(Quantizer):
    """W[o, gD : (g+1)D] = scales[o] * sum_k codebooks[k, codes[o, g, k]], fitted in the metric of the second moment.

    The format is AQLM's; the procedure is faster than the authors' and reaches a lower loss: codebooks start by k-means in the conditional
    metric of every group, codes by error feedback; then rounds of conjugate gradients on the codebooks, scales in closed form, and one sweep
    of coordinate descent over the codes, until the loss stops falling.

    Args:
        max_codebook_overhead: bits a weight that codebooks may add to `bits`. Small matrices get smaller codebooks to stay below it.
        damping: added to the second moment's diagonal before anything is optimised, relative to its mean.
        kmeans_rows: rows of the weight that the codebooks start from.
        kmeans_iterations: rounds of k-means for every codebook.
        feedback_beam: partial sums kept in the search for the first codes of a group.
        sweep_beam: the same in every later sweep over the codes.
        cg_iterations: conjugate-gradient steps on the codebooks in every round.
        tolerance: rounds end when one lowers the loss by less than this share.
        max_rounds: or after so many.
        seed: of the fresh generator that `quantize` uses when it is given none.
    """

    name = "aqlm"
    levels = LEVELS

    def __init__(
        self,
        *,
        max_codebook_overhead: float = 0.2,
        damping: float = 1e-2,
        kmeans_rows: int = 512,
        kmeans_iterations: int = 12,
        feedback_beam: int = 16,
        sweep_beam: int = 8,
        cg_iterations: int = 6,
        tolerance: float = 7e-3,
        max_rounds: int = 20,
        seed: int = 0,
    ) -> None:
        if damping <= 0:
            raise ConfigError(f"AQLM needs a damping above 0, not {damping}: second moments are seldom regular")
        if kmeans_rows < 1 or max_rounds < 1:
            raise ConfigError(f"AQLM needs at least 1 row and 1 round, not {kmeans_rows} and {max_rounds}")
        self.max_codebook_overhead = max_codebook_overhead
        self.damping = damping
        self.kmeans_rows = kmeans_rows
        self.kmeans_iterations = kmeans_iterations
        self.feedback_beam = feedback_beam
        self.sweep_beam = sweep_beam
        self.cg_iterations = cg_iterations
        self.tolerance = tolerance
        self.max_rounds = max_rounds
        self.seed = seed
        self.rank_grain = MAX_GROUP_LENGTH

    def layer_spec(self, out_features: int, in_features: int, *, bits: int, bias: bool = False) -> dict[str, Any]:
        """See `Quantizer.layer_spec`."""
        layout = self._format(out_features, in_features, bits)
        return {
            "kind": AdditiveLinear.kind,
            "in_features": in_features,
            "out_features": out_features,
            "bias": bias,
            **layout._asdict(),
        }

    @torch.no_grad()
    def quantize(
        self,
        weight: Tensor,
        second_moment: Tensor,
        *,
        bits: int,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> AdditiveLinear:
        """See `Quantizer.quantize`. Tensors are computed in float32 on the weight's device."""
        self._check_inputs(weight, second_moment, bits)
        layout = self._format(*weight.shape, bits)
        generator = torch.Generator().manual_seed(self.seed) if generator is None else generator
        padded, moment, factor = self._regular(weight.float(), second_moment.to(weight.device), layout.group_length)
        metrics, lower = conditional_metrics(factor, layout.group_length)
        scales = _row_scales(padded, weight.shape[1])
        codebooks = self._start_codebooks(padded / scales, metrics, layout, generator)
        codes = feedback_codes(padded, metrics, lower, codebooks, scales, beam=self.feedback_beam)
        codes, codebooks, scales = self._rounds(padded, moment, codes, codebooks, scales, generator)
        codebooks, scales = _balanced(codebooks, scales)
        layer = AdditiveLinear.from_codes(codes, codebooks, scales, in_features=weight.shape[1], bias=bias)
        layer.round_to_storage()
        return layer

    def _format(self, out_features: int, in_features: int, bits: int) -> AdditiveFormat:
        self._check_bits(bits)
        return choose_format(out_features, in_features, bits=bits, max_overhead=self.max_codebook_overhead)

    def _regular(self, weight: Tensor, second_moment: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, damped moment of mean diagonal 1 and its Cholesky factor, all padded to whole groups by columns that cost next to nothing."""
        symmetric = (second_moment.double() + second_moment.double().T) / 2
        unit = float(symmetric.diagonal().mean())
        symmetric = symmetric / unit if unit > 0 else symmetric
        factor, jitter = safe_cholesky(symmetric, self.damping)
        symmetric.diagonal().add_(jitter)
        surplus = -weight.shape[1] % length
        edges = (0, surplus, 0, surplus)
        moment, factor = F.pad(symmetric, edges), F.pad(factor, edges)
        if surplus:
            moment.diagonal()[-surplus:] = _PADDING_COST
            factor.diagonal()[-surplus:] = _PADDING_COST**0.5
        return F.pad(weight, (0, surplus)), moment.float(), factor.float()

    def _start_codebooks(
        self, scaled: Tensor, metrics: Tensor, layout: AdditiveFormat, generator: torch.Generator
    ) -> Tensor:
        """Residual k-means on a sample of rows: scaled (O, I), metrics (G, D, D) -> codebooks (K, C, D)."""
        rows = torch.randperm(len(scaled), generator=generator, device=generator.device)[: self.kmeans_rows]
        sample = scaled[rows.to(scaled.device)].view(-1, len(metrics), layout.group_length)
        rest = sample.permute(1, 2, 0).contiguous()  # (G, D, N)
        codebooks = []
        for _ in range(layout.num_codebooks):
            codebook = metric_kmeans(
                rest, metrics, layout.entries, iterations=self.kmeans_iterations, generator=generator
            )
            nearest = assign_entries(metrics @ rest, codebook, metrics)
            rest = rest - codebook[nearest].transpose(1, 2)
            codebooks.append(codebook)
        return torch.stack(codebooks)

    def _rounds(
        self, weight: Tensor, moment: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codebooks, scales and codes in turn. Codes come as (G, K, O) and leave as (O, G, K)."""
        weight_moment = weight @ moment
        index = _index(codes, codebooks)
        fit, before = decoded_fit(codebooks, index, moment), float("inf")
        for _ in range(self.max_rounds):
            fit = fit_codebooks(weight_moment, moment, index, scales, fit, iterations=self.cg_iterations)
            scales = _best_scales(weight_moment, fit)
            error = (weight - fit.decoded * scales).T.contiguous()
            order = torch.randperm(len(codes), generator=generator, device=generator.device)
            sweep_codes(error, moment, codes, fit.codebooks, scales, order.to(error.device), beam=self.sweep_beam)
            index = _index(codes, codebooks)
            fit = decoded_fit(fit.codebooks, index, moment)
            loss = _loss(weight, weight_moment, fit, scales)
            if loss >= (1 - self.tolerance) * before:
                break
            before = loss
        return codes.permute(2, 0, 1), fit.codebooks, scales


_PADDING_COST = 1e-6  # of a padded column, relative to the mean diagonal of the second moment
_STORED_MINIMUM = 2.0**-12  # below it float16 scales lose precision


def _index(codes: Tensor, codebooks: Tensor) -> AdditiveIndex:
    """Codes (G, K, O) for decoding, row by row."""
    return AdditiveIndex(codes.permute(2, 0, 1).contiguous(), codebooks.shape[1])


def _row_scales(weight: Tensor, width: int) -> Tensor:
    """Root mean square of every row (O, 1) over `width` real columns; 1 for a zero row, which then decodes to 0 after `_best_scales`."""
    scales = weight.norm(dim=1, keepdim=True) / width**0.5
    return torch.where(scales > 0, scales, 1.0)


def _best_scales(weight_moment: Tensor, fit: CodebookFit) -> Tensor:
    """Closed form s_o = (w_o H v_o) / (v_o H v_o), v the decoded rows; 0 where v_o is 0."""
    energy = torch.linalg.vecdot(fit.decoded, fit.decoded_moment)
    scales = torch.linalg.vecdot(fit.decoded, weight_moment) / energy
    return torch.where(energy > 0, scales, 0.0)[:, None]


def _loss(weight: Tensor, weight_moment: Tensor, fit: CodebookFit, scales: Tensor) -> float:
    """tr(E H E^T) of E = W - diag(s) V, from products that are there already."""
    error = weight - fit.decoded * scales
    return float(torch.linalg.vecdot(error, weight_moment - fit.decoded_moment * scales).sum(dtype=torch.float64))


def _balanced(codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Moves a power of two from codebooks to scales where the scales are so small that float16 would round them coarsely."""
    largest = float(scales.abs().max())
    if largest == 0 or largest >= _STORED_MINIMUM:
        return codebooks, scales
    return codebooks, scales
