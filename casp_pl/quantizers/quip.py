"""QuIP#: weights made incoherent by random Hadamard transforms and rounded to a lattice (arXiv 2402.04396).

Letters: O out, I in, P the padded width, G groups of 8 a row, S stages.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from casp_pl.errors import ConfigError
from casp_pl.kernels.lattice import GROUP_LENGTH, LATTICE_STAGES
from casp_pl.layers.lattice import LatticeLinear
from casp_pl.linalg.diagonal_fit import best_column_factors, best_row_factors
from casp_pl.linalg.incoherence import incoherent_moment, incoherent_weight, random_signs
from casp_pl.linalg.moments import in_units, moment_unit
from casp_pl.processes import RowShare
from casp_pl.quantizers.base import Quantizer
from casp_pl.quantizers.lattice_codes import LatticeMoment, LatticeSearch, choose_step, encode_rows, prepare_moment
from casp_pl.quantizers.shared import MadeOfMoment

__all__ = ["GAUSSIAN_STEPS", "QuIPSharpQuantizer"]

GAUSSIAN_STEPS = {2: 1.04, 3: 1.0, 4: 0.9}
"""By bits: the root mean square of a Gaussian weight, in units of the codebook, at which its squared error is least."""

_OTHER_STREAM = 0x9E3779B9  # the signs of su and sv must differ: on a square weight, equal ones cancel
_WIDEST_SHARED = 8192  # inputs; those of W_down, which nothing else reads, are wider and need the memory themselves


class QuIPSharpQuantizer(Quantizer):
    """W~ = U_O diag(sv) W diag(su) U_P^T is rounded to the E8P lattice codebook, groups of 8 weights at a time.

    Random signs and Hadamard transforms make weights look Gaussian, which the fixed codebook is made for; nothing but
    codes and two vectors is stored. Codes come from error feedback over blocks of 8 columns (LDLQ) and sweeps of
    coordinate descent. 3 bits add a codebook of 256 points on the residual, 4 bits E8P once more.

    Ours beyond the paper: the scale is searched for each matrix, candidates are compared in the metric of their group,
    and su and sv are fitted to the outputs at the end.

    Args:
        damping: added to the diagonal of the second moment, relative to its mean.
        sweeps: passes of coordinate descent over all groups.
        search_scale: whether each matrix gets a scale of its own; else all get that of a Gaussian.
        fit_vectors: whether su and sv are fitted in closed form once the codes are known.
        candidate_runs: points that compete for every group and shift, 1, 2, 4 ... 32; 1 is nearest in the plain metric.
        beam: partial codes kept between the stages of 3 and 4 bits.
        seed: of su's signs, and of the generator that `quantize` makes when it is given none.

    Raises:
        ConfigError: a setting is out of range.
    """

    name = "quip"
    levels = tuple(LATTICE_STAGES)
    layer = LatticeLinear

    def __init__(
        self,
        *,
        damping: float = 1e-2,
        sweeps: int = 2,
        search_scale: bool = True,
        fit_vectors: bool = True,
        candidate_runs: int = 4,
        beam: int = 4,
        seed: int = 0,
    ) -> None:
        if not damping > 0:
            raise ConfigError(f"quip: damping must be above 0, not {damping}")
        if sweeps < 0:
            raise ConfigError(f"quip: sweeps must be at least 0, not {sweeps}")
        if candidate_runs not in (1, 2, 4, 8, 16, 32):
            raise ConfigError(f"quip: candidate_runs must be 1, 2, 4, 8, 16 or 32, not {candidate_runs}")
        if beam < 1:
            raise ConfigError(f"quip: beam must be at least 1, not {beam}")
        self.damping = damping
        self.sweeps = sweeps
        self.search_scale = search_scale
        self.fit_vectors = fit_vectors
        self.candidate_runs = candidate_runs
        self.beam = beam
        self.seed = seed
        self.rank_grain = GROUP_LENGTH
        self._inputs = MadeOfMoment[tuple[Tensor, LatticeMoment]]()

    def _structure(self, out_features: int, in_features: int, bits: int) -> dict[str, Any]:
        return {"bits": bits}

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
    ) -> LatticeLinear:
        """See `Quantizer.quantize`. Computes in float32 on the weight's device, the second moment in float64."""
        self._check_inputs(weight, second_moment, bits)
        generator = torch.Generator().manual_seed(self.seed) if generator is None else generator
        weight = weight.detach().to(torch.float32)
        sv = random_signs(len(weight), generator, device=weight.device)
        second_moment, size = second_moment.to(weight.device), _root_mean_square(weight)
        su, prepared = self._inputs_of(second_moment)
        width = len(prepared.moment)
        search = LatticeSearch(LATTICE_STAGES[bits], self.sweeps, self.candidate_runs, self.beam)
        mixed = incoherent_weight(weight / (size or 1.0), su, sv, width)
        step = GAUSSIAN_STEPS[bits]
        step = choose_step(mixed, prepared, search, step, together=together) if self.search_scale else step
        share = RowShare.of_products(len(mixed), together)
        codes, _ = encode_rows(mixed[share.own] * step, prepared, search)
        codes = share.join(codes, 2)
        layer = LatticeLinear.from_codes(codes.transpose(1, 2), su, sv * (size / step), bits=bits, bias=bias)
        if self.fit_vectors:
            jitter = prepared.jitter
            del prepared, mixed
            _fit_vectors(layer, weight, _damped(second_moment, jitter))
        _balance(layer)
        layer.round_to_storage()
        return layer

    def _inputs_of(self, second_moment: Tensor) -> tuple[Tensor, LatticeMoment]:
        """Signs su of the inputs, and what is made of their second moment: the same for all that read these inputs."""
        if len(second_moment) > _WIDEST_SHARED:
            return self._prepare(second_moment)
        return self._inputs.get(second_moment, None, partial(self._prepare, second_moment))

    def _prepare(self, second_moment: Tensor) -> tuple[Tensor, LatticeMoment]:
        signs = torch.Generator().manual_seed((self.seed + _OTHER_STREAM) % 2**32)
        su = random_signs(len(second_moment), signs, device=second_moment.device)
        width = -(-len(su) // GROUP_LENGTH) * GROUP_LENGTH
        unit = moment_unit(second_moment)
        # without a name for it, what is wider is gone before it is factorised
        return su, prepare_moment(incoherent_moment(second_moment, su, width).div_(unit).float(), self.damping)


def _damped(second_moment: Tensor, jitter: float) -> Tensor:
    """In units and float32, made once more: it would have been in the way while codes were searched."""
    moment = in_units(second_moment, torch.float32)
    moment.diagonal().add_(jitter)
    return moment


def _root_mean_square(weight: Tensor) -> float:
    return float(weight.to(torch.float64).square().mean().sqrt())


def _fit_vectors(layer: LatticeLinear, weight: Tensor, moment: Tensor) -> None:
    """Fit sv, then su, to the weight (O, I) under the damped second moment (I, I), which is used up, in place."""
    layer.sv.mul_(best_row_factors(weight, layer.dequantize(), moment))
    layer.su.mul_(best_column_factors(weight, layer.dequantize(), moment))


def _balance(layer: LatticeLinear) -> None:
    """Move a power of two between su and sv where one of them is too small or too large for float16."""
    inputs, outputs = (float(vector.abs().max()) for vector in (layer.su, layer.sv))
    if inputs == 0 or outputs == 0 or 2.0**-10 <= outputs <= 2.0**10:
        return
    factor = 2.0 ** round(math.log2(inputs / outputs) / 2)
    layer.su.div_(factor)
    layer.sv.mul_(factor)
