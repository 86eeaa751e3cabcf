"""In which precision the stages compute."""

import pytest
import torch

from casp_pl.pipeline.trainers import TrainerFactory


@pytest.mark.parametrize(
    ("settings", "capabilities", "expected"),
    [
        ({"accelerator": "cpu"}, {"avx512_bf16": True}, "bf16-mixed"),
        ({"accelerator": "cpu"}, {"avx512_bf16": False, "amx_bf16": True}, "bf16-mixed"),
        ({"accelerator": "cpu"}, {"avx2": True}, None),
        ({"accelerator": "cpu", "precision": "32-true"}, {"avx512_bf16": True}, "32-true"),
        ({"accelerator": "cpu", "precision": "bf16-mixed"}, {"avx2": True}, "bf16-mixed"),
    ],
)
def test_stages_compute_in_bf16_where_the_cpu_has_it_and_nothing_else_is_asked(
    settings: dict[str, str], capabilities: dict[str, bool], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert TrainerFactory(settings, None).working_precision == expected


def test_only_evaluation_stays_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    factory = TrainerFactory({"accelerator": "cpu"}, None)
    assert factory.make().precision == "32-true"
    with factory.make(precision=factory.working_precision).precision_plugin.forward_context():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
