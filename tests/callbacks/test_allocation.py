"""The two allocation callbacks on a real calibration pass of the tiny model."""

import lightning.pytorch as pl
import pytest
import torch

from casp_pl.callbacks import BitAllocation, LowRankAllocation
from casp_pl.data import CalibrationData
from casp_pl.errors import ConfigError
from casp_pl.models import adapt, load_model
from casp_pl.models.adapter import ModelAdapter
from casp_pl.modules import CalibrationModule
from casp_pl.modules.sensitivity import linear_sensitivities
from casp_pl.quantizers import AQLMQuantizer


@pytest.fixture(scope="module")
def calibrated() -> tuple[ModelAdapter, CalibrationModule]:
    model, processor = load_model("tiny")
    data = CalibrationData(samples=8, text_length=24, batch_size=4)
    data.attach(processor)
    adapter, batches = adapt(model), list(data.calibration_dataloader())
    sensitivity = linear_sensitivities(adapter, batches, seed=0)
    module = CalibrationModule(adapter, batches, measure_rounding=True, sensitivity=sensitivity)
    settings = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = pl.Trainer(enable_model_summary=False, **settings)
    trainer.validate(module, verbose=False)
    return module.adapter, module


def _choose(
    calibrated: tuple[ModelAdapter, CalibrationModule], low_rank: LowRankAllocation, **bits: object
) -> BitAllocation:
    allocation = BitAllocation(**bits)
    allocation.attach(AQLMQuantizer(), low_rank)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    for callback in (low_rank, allocation):
        callback.on_validation_end(trainer, calibrated[1])
    return allocation


@pytest.mark.parametrize("mode", ["uniform", "spectral"])
def test_ranks_keep_the_share_of_parameters(calibrated: tuple[ModelAdapter, CalibrationModule], mode: str) -> None:
    low_rank = LowRankAllocation(mode=mode, keep_ratio=0.5)
    _choose(calibrated, low_rank, budget=3.5)
    adapter, module = calibrated
    shapes = {adapter.full_name(b, n): adapter.shapes(b)[n] for b in range(2) for n in adapter.low_rank_names}
    assert set(low_rank.ranks) == set(shapes)
    kept = sum(
        o * i if low_rank.ranks[name] is None else low_rank.ranks[name] * (o + i) for name, (o, i) in shapes.items()
    )
    assert kept <= 0.5 * sum(o * i for o, i in shapes.values())
    assert all(rank is None or rank % 8 == 0 for rank in low_rank.ranks.values())
    if mode == "uniform":
        assert all(
            rank == int(0.5 * o * i / (o + i)) // 8 * 8
            for rank, (o, i) in zip(low_rank.ranks.values(), shapes.values(), strict=True)
        )


@pytest.mark.parametrize("score", ["block_influence", "sensitivity", "proxy_loss", "first_last", "uniform"])
@pytest.mark.parametrize("counts", ["codes", "total"])
def test_the_budget_is_kept_and_spent(
    calibrated: tuple[ModelAdapter, CalibrationModule], score: str, counts: str
) -> None:
    budget = 3.0 if counts == "codes" else 3.4
    plan = _choose(calibrated, LowRankAllocation(mode="off"), budget=budget, score=score, counts=counts).plan
    assert plan is not None
    quantizer = AQLMQuantizer()
    cost = quantizer.code_bits if counts == "codes" else quantizer.storage_bits
    spent = sum(cost(*module.shape, bits=module.bits) for module in plan.modules)
    weights = sum(module.shape[0] * module.shape[1] for module in plan.modules)
    assert spent <= budget * weights
    for block in plan.blocks:  # no block could get the next level
        modules, rest = plan.of_block(block), spent
        level = modules[0].bits
        assert {module.bits for module in modules} == {level}
        if level < max(quantizer.levels):
            rest += sum(cost(*m.shape, bits=level + 1) - cost(*m.shape, bits=level) for m in modules)
            assert rest > budget * weights


def test_scores_follow_the_measured_block_influence(calibrated: tuple[ModelAdapter, CalibrationModule]) -> None:
    statistics = calibrated[1].statistics
    assert statistics is not None
    plan = _choose(calibrated, LowRankAllocation(mode="off"), budget=3.0).plan
    assert plan is not None
    scores = torch.tensor([sum(module.score for module in plan.of_block(block)) for block in plan.blocks])
    torch.testing.assert_close(scores, statistics.block_influence, rtol=1e-4, atol=0)


def test_sensitive_linears_get_the_bits(calibrated: tuple[ModelAdapter, CalibrationModule]) -> None:
    statistics = calibrated[1].statistics
    assert statistics is not None
    sensitive = {"score": "sensitivity", "granularity": "linear", "budget": 2.5}
    plan = _choose(calibrated, LowRankAllocation(mode="off"), **sensitive).plan
    assert plan is not None
    assert {module.name: module.score for module in plan.modules} == pytest.approx(statistics.sensitivity)
    for shape in {module.shape for module in plan.modules}:  # among linears of one cost the more sensitive have more
        alike = sorted((module for module in plan.modules if module.shape == shape), key=lambda module: -module.score)
        assert [module.bits for module in alike] == sorted((module.bits for module in alike), reverse=True)
    assert len({module.bits for module in plan.modules}) > 1


@pytest.mark.parametrize("wrong", [{"budget": 0.0}, {"budget": 1.0}])
def test_an_impossible_budget_is_refused(
    calibrated: tuple[ModelAdapter, CalibrationModule], wrong: dict[str, float]
) -> None:
    with pytest.raises(ConfigError, match="budget"):
        _choose(calibrated, LowRankAllocation(mode="off"), **wrong)
