"""Statistics of the calibration pass against dense maths on what transformers itself returns."""

import dataclasses
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from casp_pl.models import adapt, load_model
from casp_pl.modules import CalibrationModule, CalibrationStatistics, calibration


@pytest.fixture(scope="module")
def measured() -> tuple[CalibrationStatistics, dict[str, torch.Tensor], nn.Module]:
    return _measured("32-true")


def _measured(precision: Any) -> tuple[CalibrationStatistics, dict[str, torch.Tensor], nn.Module]:
    model, _ = load_model("tiny")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 200, (3, 23), generator=generator)
    ids[:, 2:18] = 258  # one image of 16 patches
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    module = CalibrationModule(adapt(model), [batch], measure_rounding=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", precision=precision, enable_model_summary=False, **quiet)
    trainer.validate(module, verbose=False)
    assert module.statistics is not None
    return module.statistics, batch, model


def test_counts(measured: tuple[CalibrationStatistics, dict[str, torch.Tensor], nn.Module]) -> None:
    statistics, _, _ = measured
    assert (statistics.tokens, statistics.image_tokens) == (3 * 23 - 3, 48)


def test_block_influence_and_sparsity(
    measured: tuple[CalibrationStatistics, dict[str, torch.Tensor], nn.Module],
) -> None:
    statistics, batch, model = measured
    model.model.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True, output_attentions=True)
    real = batch["attention_mask"].bool()
    states = output.hidden_states
    influence = 1 - nn.functional.cosine_similarity(states[0][real], states[1][real], dim=-1).mean()
    torch.testing.assert_close(statistics.block_influence[0], influence, rtol=1e-4, atol=1e-6)
    image = batch["input_ids"] == 258
    below, total = torch.zeros(4, dtype=torch.float64), 0
    for row in range(3):
        for query in range(23):
            for key in range(query + 1):
                if image[row, query] and not image[row, key] and real[row, query]:
                    probabilities = output.attentions[1][row, :, query, key]
                    below += (probabilities < 1e-3).double()
                    total += 1
    assert statistics.attention_sparsity[1, 1, 0].item() == pytest.approx(below.mean().item() / total, abs=1e-6)
    assert statistics.head_sparsity is not None
    torch.testing.assert_close(statistics.head_sparsity[1, :, 1, 0], (below / total).float(), rtol=0, atol=1e-6)


def test_spectra_are_those_of_the_whitened_weights(
    measured: tuple[CalibrationStatistics, dict[str, torch.Tensor], nn.Module],
) -> None:
    statistics, batch, model = measured
    seen = []
    layer = model.model.language_model.layers[1].self_attn.k_proj
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    x = seen[0][batch["attention_mask"].bool()].double()
    # singular values of W L equal those of W X^T / sqrt(N), whatever root of the second moment L is
    expected = torch.linalg.svdvals(layer.weight.double() @ x.T / len(x) ** 0.5)[:10].float()
    actual = statistics.spectra["model.language_model.layers.1.self_attn.k_proj"][:10]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_rounding_is_measured_for_every_linear(
    measured: tuple[CalibrationStatistics, dict[str, torch.Tensor], nn.Module],
) -> None:
    statistics, _, _ = measured
    assert len(statistics.rounding) == 14
    assert all(0 < loss < 1 for loss in statistics.rounding.values())


def test_round_trip(measured: tuple[CalibrationStatistics, dict[str, torch.Tensor], nn.Module]) -> None:
    statistics, _, _ = measured
    statistics = dataclasses.replace(statistics, sensitivity={"layers.0.mlp.up_proj": 0.25})
    again = CalibrationStatistics.from_tensors(statistics.tensors())
    assert again.sensitivity == statistics.sensitivity
    torch.testing.assert_close(again.attention_sparsity, statistics.attention_sparsity, equal_nan=True)
    torch.testing.assert_close(again.head_sparsity, statistics.head_sparsity, equal_nan=True)
    earlier = {name: tensor for name, tensor in statistics.tensors().items() if name != "head_sparsity"}
    assert CalibrationStatistics.from_tensors(earlier).head_sparsity is None
    assert again.rounding == pytest.approx(statistics.rounding)
    assert (again.tokens, sorted(again.spectra)) == (statistics.tokens, sorted(statistics.spectra))


def test_half_precision_changes_the_statistics_little(
    measured: tuple[CalibrationStatistics, dict[str, torch.Tensor], nn.Module],
) -> None:
    exact, half = measured[0], _measured("bf16-mixed")[0]
    torch.testing.assert_close(half.block_influence, exact.block_influence, rtol=0.02, atol=0)
    assert not torch.equal(half.block_influence, exact.block_influence), "bf16 was not used"
    for name, spectrum in exact.spectra.items():
        torch.testing.assert_close(half.spectra[name], spectrum, rtol=0, atol=0.01 * float(spectrum.max()), msg=name)


def test_losses_and_spectra_are_computed_outside_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = []
    for name in ("relative_proxy_loss", "whitened_spectrum"):
        real = getattr(calibration, name)

        def seen(*given: Any, real: Any = real) -> Any:
            inside.append(torch.is_autocast_enabled("cpu"))
            return real(*given)

        monkeypatch.setattr(calibration, name, seen)
    _measured("bf16-mixed")
    assert inside
    assert not any(inside)
