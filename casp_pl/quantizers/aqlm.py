"""AQLM: a weight as sums of codebook entries, fitted to the layer's outputs (arXiv 2401.06118).

Letters: O out, I in, G groups a row, K codebooks, C entries a codebook, D group length, N rows of a sample.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from casp_pl.errors import ConfigError
from casp_pl.kernels.additive import AdditiveIndex
from casp_pl.layers.additive import AdditiveLinear
from casp_pl.linalg.cholesky import safe_cholesky
from casp_pl.linalg.codebook_cg import fit_codebooks
from casp_pl.linalg.kmeans import assign_entries, metric_kmeans
from casp_pl.linalg.moments import in_units, moment_unit
from casp_pl.processes import RowShare
from casp_pl.quantizers.additive_codes import conditional_metrics, feedback_codes, sweep_codes
from casp_pl.quantizers.additive_formats import DEFAULT_FORMATS, AdditiveFormat, choose_format, parse_formats
from casp_pl.quantizers.base import Quantizer
from casp_pl.quantizers.shared import MadeOfMoment

__all__ = ["AQLMQuantizer"]

_PADDING_COST = 1e-6  # of an error in a padded column, relative to the mean column
_SMALLEST_SCALE = 2.0**-10  # if all are below, codebooks lend the scales a power of two: float16 has few digits there


class AQLMQuantizer(Quantizer):
    """W[o, gD : (g+1)D] = scales[o] * sum_k codebooks[k, codes[o, g, k]].

    The format is AQLM's, the procedure our own. Codebooks start by residual k-means in the conditional metric of every
    group, codes by error feedback with a beam search. Then, until the loss stops falling: conjugate gradients on the
    codebooks, row scales in closed form, and a sweep that searches better codes for one group after the other.

    Args:
        max_codebook_overhead: bits a weight that codebooks may cost beside the codes; small matrices get small
            codebooks.
        formats: {bits: [[codebooks, entries, group length], ...]} in the order of preference, for bits where the
            built-in ones are not wanted. {2: [[2, 256, 8]]} gives every matrix the shape that is known as AQLM 2x8.
        damping: added to the diagonal of the second moment, relative to its mean.
        kmeans_rows: rows of the weight that the first codebooks are made from.
        kmeans_iterations: rounds of k-means for every codebook.
        feedback_beam: width of the beam search for the first codes, a power of two.
        sweep_beam: width of the beam search in every sweep, a power of two. 8 instead of 4 lowers the loss by 1 % and
            takes a third longer.
        cg_iterations: conjugate-gradient steps on the codebooks in a round.
        fit_rows: rows that codebooks are fitted to, others in every round; more where they have fewer weights than
            `fit_weights`, and all of a matrix that has no more.
        fit_weights: for each number in the codebooks. On linears of SmolLM2, 108 instead of 216, which is all of them,
            raise the loss by up to .3 %, 54 by up to 1.4 %.
        tolerance: the rounds end when one lowers the loss by less than this share of it.
        max_rounds: they end after so many in any case.
        seed: of the generator that `quantize` makes when it is given none.

    Raises:
        ConfigError: a setting is out of range.
    """

    name = "aqlm"
    levels = tuple(DEFAULT_FORMATS)
    layer = AdditiveLinear

    def __init__(
        self,
        *,
        max_codebook_overhead: float = 0.15,
        formats: dict[int, list[list[int]]] | None = None,
        damping: float = 1e-2,
        kmeans_rows: int = 512,
        kmeans_iterations: int = 12,
        feedback_beam: int = 16,
        sweep_beam: int = 4,
        cg_iterations: int = 6,
        fit_rows: int = 512,
        fit_weights: int = 256,
        tolerance: float = 7e-3,
        max_rounds: int = 20,
        seed: int = 0,
    ) -> None:
        positive = {"damping": damping, "kmeans_rows": kmeans_rows, "max_rounds": max_rounds}
        positive |= {"fit_rows": fit_rows, "fit_weights": fit_weights}
        for key, value in positive.items():
            if not value > 0:
                raise ConfigError(f"aqlm: {key} must be above 0, not {value}")
        for key, value in {"kmeans_iterations": kmeans_iterations, "cg_iterations": cg_iterations}.items():
            if value < 0:
                raise ConfigError(f"aqlm: {key} must be at least 0, not {value}")
        for key, value in {"feedback_beam": feedback_beam, "sweep_beam": sweep_beam}.items():
            if value < 1 or value & (value - 1):
                raise ConfigError(f"aqlm: {key} must be 1, 2, 4, 8 ..., not {value}")
        self.max_codebook_overhead = max_codebook_overhead
        self.formats = DEFAULT_FORMATS | parse_formats(formats or {})
        self.damping = damping
        self.kmeans_rows = kmeans_rows
        self.kmeans_iterations = kmeans_iterations
        self.feedback_beam = feedback_beam
        self.sweep_beam = sweep_beam
        self.cg_iterations = cg_iterations
        self.fit_rows = fit_rows
        self.fit_weights: float = fit_weights
        self.tolerance = tolerance
        self.max_rounds = max_rounds
        self.seed = seed
        self.rank_grain = max(layout.group_length for ladder in self.formats.values() for layout in ladder)
        self._inputs = MadeOfMoment[_Inputs]()

    def _structure(self, out_features: int, in_features: int, bits: int) -> dict[str, Any]:
        return self._format(out_features, in_features, bits)._asdict()

    @torch.no_grad()
    def quantize(
        self,
        weight: Tensor,
        second_moment: Tensor,
        *,
        bits: int,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
        together: bool = False,
    ) -> AdditiveLinear:
        """See `Quantizer.quantize`. Computes in float32 on the weight's device."""
        self._check_inputs(weight, second_moment, bits)
        layout = self._format(weight.shape[0], weight.shape[1], bits)
        generator = torch.Generator().manual_seed(self.seed) if generator is None else generator
        length, moment = layout.group_length, second_moment.to(weight.device)
        inputs = self._inputs.get(moment, (length, self.damping), lambda: _prepare(moment, length, self.damping))
        padded = F.pad(weight.to(torch.float32), (0, len(inputs.moment) - weight.shape[1]))
        scales = _row_norms(padded, weight.shape[1])
        codebooks = self._start_codebooks(padded / scales, inputs.metrics, layout, generator, together)
        share = RowShare(len(weight), together)
        own = (padded[share.own], inputs.metrics, inputs.lower, codebooks, scales[share.own])
        codes = share.join(feedback_codes(*own, beam=self.feedback_beam), 2)
        codebooks, scales = _balanced(*self._improve(padded, inputs.moment, codes, codebooks, scales, generator, share))
        layer = AdditiveLinear.from_codes(
            codes.permute(2, 0, 1), codebooks, scales, in_features=weight.shape[1], bias=bias
        )
        layer.round_to_storage()
        return layer

    def _format(self, out_features: int, in_features: int, bits: int) -> AdditiveFormat:
        self._check_bits(bits)
        return choose_format(self.formats[bits], out_features, in_features, max_overhead=self.max_codebook_overhead)

    def for_part(self, share: float, out_features: int, in_features: int, bits: int) -> "AQLMQuantizer":
        """One that does a part of a matrix as this one does the whole: in its format, with a share of the rows."""
        part = copy.copy(self)
        part.formats = self.formats | {bits: (self._format(out_features, in_features, bits),)}
        part.kmeans_rows = max(1, round(self.kmeans_rows * share))
        part.fit_rows, part.fit_weights = max(1, round(self.fit_rows * share)), self.fit_weights * share**2
        return part

    def _start_codebooks(
        self, scaled: Tensor, metrics: Tensor, layout: AdditiveFormat, generator: torch.Generator, together: bool
    ) -> Tensor:
        """Residual k-means of a sample of rows: scaled (O, I), metrics (G, D, D) -> codebooks (K, C, D)."""
        rows = torch.randperm(len(scaled), generator=generator, device=generator.device)[: self.kmeans_rows]
        sample = scaled[rows.to(scaled.device)].view(len(rows), -1, layout.group_length)
        rest = sample.permute(1, 2, 0).contiguous()  # (G, D, N)
        share = RowShare(len(metrics), together)  # of positions: that of a vector does not matter to another

        def assign(weighted: Tensor, centroids: Tensor, metrics: Tensor) -> Tensor:
            return share.join(assign_entries(weighted[share.own], centroids, metrics[share.own]))

        codebooks = []
        for _ in range(layout.num_codebooks):
            codebook = metric_kmeans(
                rest, metrics, layout.entries, iterations=self.kmeans_iterations, generator=generator, assign=assign
            )
            nearest = assign(metrics @ rest, codebook, metrics)
            rest = rest - codebook[nearest].transpose(1, 2)
            codebooks.append(codebook)
        return torch.stack(codebooks)

    def _improve(
        self,
        weight: Tensor,
        moment: Tensor,
        codes: Tensor,
        codebooks: Tensor,
        scales: Tensor,
        generator: torch.Generator,
        share: RowShare,
    ) -> tuple[Tensor, Tensor]:
        """Rounds of codebooks, scales and codes. Codes (G, K, O) change in place; codebooks and scales are returned."""

        def multiply(rows: Tensor) -> Tensor:
            part = RowShare(len(rows), share.together)
            return part.join(rows[part.own] @ moment)

        weight_moment, before = multiply(weight), float("inf")
        for _ in range(self.max_rounds):
            rows = self._sample(len(weight), codebooks.numel() / weight.shape[1], generator, weight.device)
            index = _by_row(codes[:, :, rows], codebooks)
            given = (weight_moment[rows], multiply, moment.diagonal(), index, scales[rows], codebooks)
            codebooks = fit_codebooks(*given, iterations=self.cg_iterations)
            decoded = _by_row(codes, codebooks).gather(codebooks, torch.ones_like(scales))
            decoded_moment = multiply(decoded)
            scales = _best_scales(weight_moment, decoded, decoded_moment)
            error = decoded.mul_(-scales).add_(weight)
            rest = decoded_moment.mul_(-scales).add_(weight_moment)
            loss = rest.mul_(error).sum(dim=1)
            del decoded, decoded_moment, rest
            order = torch.randperm(len(codes), generator=generator, device=generator.device).to(error.device)
            own, found = error[share.own].T.contiguous(), codes[:, :, share.own].contiguous()
            del error
            fall = sweep_codes(own, moment, found, codebooks, scales[share.own], order, beam=self.sweep_beam)
            codes[:] = share.join(found, 2)
            total = float((loss - share.join(fall)).sum(dtype=torch.float64))
            if total >= (1 - self.tolerance) * before:
                break
            before = total
        return codebooks, scales

    def _sample(self, rows: int, numbers: float, generator: torch.Generator, device: torch.device) -> slice | Tensor:
        """Indices of the rows that codebooks with so many numbers a column of the weight are fitted to; or all rows."""
        enough = max(self.fit_rows, math.ceil(self.fit_weights * numbers))
        if enough >= rows:
            return slice(None)
        drawn = torch.randperm(rows, generator=generator, device=generator.device)[:enough]
        return drawn.sort().values.to(device)


class _Inputs(NamedTuple):
    """Damped second moment (I, I) in units of its mean diagonal, and its `conditional_metrics`.

    They are padded to a whole number of groups; an error in a padded column costs next to nothing.
    """

    moment: Tensor
    metrics: Tensor
    lower: Tensor


def _prepare(second_moment: Tensor, length: int, damping: float) -> _Inputs:
    unit = moment_unit(second_moment)
    factor, jitter = safe_cholesky(second_moment, damping)
    factor = _padded(factor, length, math.sqrt(_PADDING_COST * unit))
    metrics, lower = conditional_metrics(factor, length, torch.float32)
    del factor  # a gigabyte at I = 11008
    moment = in_units(second_moment, torch.float32)
    moment.diagonal().add_(jitter / unit)
    return _Inputs(_padded(moment, length, _PADDING_COST), (metrics / unit).to(torch.float32), lower)


def _padded(matrix: Tensor, length: int, value: float) -> Tensor:
    """A square matrix with as many rows and columns as make whole groups; only the new diagonal is not 0."""
    surplus = -len(matrix) % length
    if not surplus:
        return matrix
    padded = F.pad(matrix, (0, surplus, 0, surplus))
    padded.diagonal()[len(matrix) :] = value
    return padded


def _row_norms(weight: Tensor, width: int) -> Tensor:
    """Root mean square of every row over its `width` real columns (O, 1); 1 for a row of zeros."""
    norms = weight.norm(dim=1, keepdim=True) / width**0.5
    return torch.where(norms > 0, norms, 1.0)


def _best_scales(weight_moment: Tensor, decoded: Tensor, decoded_moment: Tensor) -> Tensor:
    """s_o = (w_o H v_o) / (v_o H v_o) of the decoded rows v (O, 1); 0 where v is 0. A row of zeros gets 0."""
    energy = torch.linalg.vecdot(decoded, decoded_moment)
    scales = torch.linalg.vecdot(decoded, weight_moment) / energy
    return torch.where(energy > 0, scales, 0.0)[:, None]


def _by_row(codes: Tensor, codebooks: Tensor) -> AdditiveIndex:
    """Codes (G, K, O) indexed in the layer's order (O, G, K)."""
    return AdditiveIndex(codes.permute(2, 0, 1).contiguous(), codebooks.shape[1])


def _balanced(codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Moves a power of two from the codebooks into scales that are too small or too large for float16."""
    largest = float(scales.abs().max())
    if largest == 0 or _SMALLEST_SCALE <= largest <= 1 / _SMALLEST_SCALE:
        return codebooks, scales
    factor = 2.0 ** round(math.log2(float(codebooks.abs().max()) / largest) / 2)
    return codebooks / factor, scales * factor
