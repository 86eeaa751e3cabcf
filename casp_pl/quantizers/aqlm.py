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
from casp_pl.linalg.products import full_width_matmul
from casp_pl.processes import RowShare
from casp_pl.quantizers.additive_codes import conditional_metrics, feedback_codes, sweep_codes
from casp_pl.quantizers.additive_formats import DEFAULT_FORMATS, AdditiveFormat, choose_format, parse_formats
from casp_pl.quantizers.base import Quantizer
from casp_pl.quantizers.shared import MadeOfMoment

__all__ = ["AQLMQuantizer"]

_PADDING_COST = 1e-6  # of an error in a padded column, relative to the mean column
_SHARED_WIDTH = 8192  # wider inputs are those of a block's last linear, read by no other: not kept, half a GB at 11008
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
        self._feedback = MadeOfMoment[_Feedback]()

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
        moment, share = second_moment.to(weight.device), RowShare.of_products(len(weight), together)
        own, codes, codebooks, scales, damping = self._start(weight, moment, layout, generator, share)
        moment = _damped(moment, layout.group_length, damping)
        codebooks, scales = self._improve(own, moment, codes, codebooks, scales, generator, share)
        codes, scales = share.join(codes.permute(2, 0, 1)), share.join(scales)
        tables = _balanced(codebooks, scales)
        layer = AdditiveLinear.from_codes(codes, *tables, in_features=weight.shape[1], bias=bias)
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

    def _start(
        self, weight: Tensor, moment: Tensor, layout: AdditiveFormat, generator: torch.Generator, share: RowShare
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Padded weight (O, G D), codes (G, K, O) and scales of the own rows, codebooks, and damping of the moment."""
        feedback = self._feedback_of(moment, layout.group_length)
        padded = F.pad(weight.to(torch.float32), (0, len(feedback.lower) - weight.shape[1]))
        scales = _row_norms(padded, weight.shape[1])
        codebooks = self._start_codebooks(padded, scales, feedback.metrics, layout, generator, share.together)
        own, scales = padded[share.own], scales[share.own]
        given = (own, feedback.metrics, feedback.lower, codebooks, scales)
        return own, feedback_codes(*given, beam=self.feedback_beam), codebooks, scales, feedback.damping

    def _feedback_of(self, moment: Tensor, length: int) -> "_Feedback":
        if len(moment) > _SHARED_WIDTH:
            return _make_feedback(moment, length, self.damping)
        settings = length, self.damping
        return self._feedback.get(moment, settings, lambda: _make_feedback(moment, *settings))

    def _start_codebooks(
        self,
        weight: Tensor,
        scales: Tensor,
        metrics: Tensor,
        layout: AdditiveFormat,
        generator: torch.Generator,
        together: bool,
    ) -> Tensor:
        """Residual k-means of a sample of scaled rows: weight (O, I), metrics (G, D, D) -> codebooks (K, C, D)."""
        rows = torch.randperm(len(weight), generator=generator, device=generator.device)[: self.kmeans_rows]
        rows = rows.to(weight.device)
        sample = (weight[rows] / scales[rows]).view(len(rows), -1, layout.group_length)
        rest = sample.permute(1, 2, 0).contiguous()  # (G, D, N)
        share = RowShare(len(metrics), together)  # of positions: that of a vector does not matter to another
        own = metrics[share.own]
        codebooks = []
        for _ in range(layout.num_codebooks):
            codebook = metric_kmeans(
                rest, metrics, layout.entries, iterations=self.kmeans_iterations, generator=generator, share=share
            )
            nearest = share.join(assign_entries(own @ rest[share.own], codebook, own))
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
        """Rounds of codebooks, scales and codes. Codes (G, K, O) change in place; codebooks and scales are returned.

        Weight, codes and scales are those of the own rows; O is their number.
        """
        weight_moment, before = full_width_matmul(weight, moment), float("inf")
        for _ in range(self.max_rounds):
            rows, bounds = self._sample(share, codebooks.numel() / weight.shape[1], generator, weight.device)
            index = _by_row(codes[:, :, rows], codebooks, bounds)
            given = (weight_moment[rows], moment, index, scales[rows], codebooks)
            codebooks = fit_codebooks(*given, iterations=self.cg_iterations, sum_parts=share.sum)
            decoded = _by_row(codes, codebooks).gather(codebooks, torch.ones_like(scales))
            decoded_moment = full_width_matmul(decoded, moment)
            scales = _best_scales(weight_moment, decoded, decoded_moment)
            error = decoded.mul_(-scales).add_(weight)
            rest = decoded_moment.mul_(-scales).add_(weight_moment)
            loss = rest.mul_(error).sum(dim=1)
            del decoded, decoded_moment, rest
            order = torch.randperm(len(codes), generator=generator, device=generator.device).to(error.device)
            transposed = error.T.contiguous()
            del error
            loss -= sweep_codes(transposed, moment, codes, codebooks, scales, order, beam=self.sweep_beam)
            total = float(share.join(loss).sum(dtype=torch.float64))
            if total >= (1 - self.tolerance) * before:
                break
            before = total
        return codebooks, scales

    def _sample(
        self, share: RowShare, numbers: float, generator: torch.Generator, device: torch.device
    ) -> tuple[slice | Tensor, list[int]]:
        """Own rows of the sample that codebooks with so many numbers a column are fitted to, and where parts begin.

        It has all rows where these are few.
        """
        enough = max(self.fit_rows, math.ceil(self.fit_weights * numbers))
        if enough >= share.rows:
            return slice(None), share.bounds
        drawn = torch.randperm(share.rows, generator=generator, device=generator.device)[:enough].sort().values
        drawn = drawn.cpu() - share.own.start
        parts = torch.tensor(share.bounds, dtype=torch.int64, device=drawn.device)
        first, *_, end = bounds = torch.searchsorted(drawn, parts).tolist()
        return drawn[first:end].to(device), [bound - first for bound in bounds]


class _Feedback(NamedTuple):
    """`conditional_metrics` of a moment in units of its mean diagonal, and what was added to it in these units."""

    metrics: Tensor
    lower: Tensor
    damping: float


def _make_feedback(second_moment: Tensor, length: int, damping: float) -> _Feedback:
    unit = moment_unit(second_moment)
    factor, jitter = safe_cholesky(second_moment, damping)
    factor = _padded(factor, length, math.sqrt(_PADDING_COST * unit))
    metrics, lower = conditional_metrics(factor, length, torch.float32)
    return _Feedback((metrics / unit).to(torch.float32), lower, jitter / unit)


def _damped(second_moment: Tensor, length: int, damping: float) -> Tensor:
    """A padded copy in units of the mean diagonal, with `damping` added to it; an error in a pad costs almost nothing.

    It is made after the first codes: while they are found the factor takes as much memory.
    """
    moment = in_units(second_moment, torch.float32)
    moment.diagonal().add_(damping)
    return _padded(moment, length, _PADDING_COST)


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
    energy = _row_dots(decoded, decoded_moment)
    scales = _row_dots(decoded, weight_moment) / energy
    return torch.where(energy > 0, scales, 0.0)[:, None]


def _row_dots(left: Tensor, right: Tensor) -> Tensor:
    """<l_o, r_o> (O,); `vecdot` would make all products first."""
    return torch.bmm(left[:, None], right[:, :, None]).flatten()


def _by_row(codes: Tensor, codebooks: Tensor, bounds: list[int] | None = None) -> AdditiveIndex:
    """Codes (G, K, O) indexed in the layer's order (O, G, K)."""
    small = codes.to(torch.uint8)  # before they are copied; a codebook has 256 entries at most
    return AdditiveIndex(small.permute(2, 0, 1).contiguous(), codebooks.shape[1], bounds)


def _balanced(codebooks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Moves a power of two from the codebooks into scales that are too small or too large for float16."""
    largest = float(scales.abs().max())
    if largest == 0 or _SMALLEST_SCALE <= largest <= 1 / _SMALLEST_SCALE:
        return codebooks, scales
    factor = 2.0 ** round(math.log2(float(codebooks.abs().max()) / largest) / 2)
    return codebooks / factor, scales * factor
