"""Encoding groups of eight weights as points of a lattice, in the metric of the group.

No symmetry helps in a general metric, so E8P gives candidates that lie near in the plain metric, and the metric chooses
among them. Codes of several stages are searched with a beam. QuIP# (arXiv 2402.04396) takes the nearest point in the
plain metric; on SmolLM2's second moments four runs of candidates lower the loss by 0.5 to 3 %.

Letters: O out (rows, encoded at once), S stages, B beam width, K candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from casp_pl.kernels.lattice import GROUP_LENGTH, QUARTER, LatticeStage, decode_points
from casp_pl.kernels.lattice_nearest import e8p_candidates, e8p_nearest
from casp_pl.kernels.nearest import nearest_entries

__all__ = ["nearest_lattice_codes", "squared_lengths", "stage_values"]


def nearest_lattice_codes(
    target: Tensor, metric: Tensor, stages: Sequence[LatticeStage], *, runs: int, beam: int
) -> tuple[Tensor, Tensor]:
    """Codes of points near to the targets.

    Args:
        target: (8, O), float32, in units of the codebook.
        metric: M (8, 8), symmetric and positive definite.
        stages: of the code.
        runs: of candidates from E8P, see `e8p_candidates`.
        beam: partial codes that are kept between stages.

    Returns:
        Codes (S, O) int64 and what is left of the targets (8, O).
    """
    plain = len(stages) == 1 and stages[0].kind == "e8p" and stages[0].scale == 1
    if plain and (nearest := e8p_nearest(target, metric, runs)) is not None:
        return nearest[0][None], nearest[1]
    rest, codes = target[:, None], torch.empty(0, 1, target.shape[1], dtype=torch.int64, device=target.device)
    for number, stage in enumerate(stages):
        found = _stage_candidates(rest.flatten(1), metric, stage, runs).view(-1, *rest.shape[1:])  # (K, B, O)
        left = rest[:, None] - stage_values(found.flatten(), stage).view(GROUP_LENGTH, *found.shape)
        left = left.flatten(1, 2)  # (8, K B, O)
        costs = squared_lengths(left, metric)
        width = 1 if number == len(stages) - 1 else min(beam, len(costs))
        kept = costs.topk(width, dim=0, largest=False).indices if width > 1 else costs.min(dim=0, keepdim=True).indices
        rest = left.gather(1, kept.expand(GROUP_LENGTH, *kept.shape))
        parent = codes.gather(1, (kept % codes.shape[1]).expand(len(codes), *kept.shape))
        codes = torch.cat([parent, found.flatten(0, 1).gather(0, kept)[None]])
    return codes[:, 0], rest[:, 0]


def squared_lengths(x: Tensor, metric: Tensor) -> Tensor:
    """x^T M x of every vector: x (8, ...), M (8, 8) -> (...)."""
    return ((metric @ x.flatten(1)).view(x.shape) * x).sum(dim=0)


def stage_values(codes: Tensor, stage: LatticeStage) -> Tensor:
    """What one stage adds to the value: codes (N,) -> (8, N), float32."""
    points = decode_points(codes, stage.points(codes.device))
    return points.T.to(torch.float32) * (QUARTER / stage.scale)


def _stage_candidates(rest: Tensor, metric: Tensor, stage: LatticeStage, runs: int) -> Tensor:
    """Codes (K, N) for rest (8, N)."""
    if stage.kind == "e8p":
        return e8p_candidates(rest * stage.scale, runs)
    points = stage.points(rest.device).to(torch.float32) * QUARTER
    norms = squared_lengths(points.T, metric)
    return nearest_entries(metric @ rest * stage.scale, points, norms)[None]
