"""In which precision and how the stages compute."""

import subprocess
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from casp_pl.errors import ConfigError
from casp_pl.modules import BlockwiseModule, CalibrationModule, EndToEndModule
from casp_pl.modules.evaluation import EvaluationModule
from casp_pl.pipeline.trainers import TrainerFactory, require_free_keys, require_one_half_type


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


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(None, None), (32, None), ("32-true", None), ("bf16", torch.bfloat16), ("bf16-mixed", torch.bfloat16)]
    + [(16, torch.float16), ("16-mixed", torch.float16)],
)
def test_all_names_of_a_precision_are_known(precision: str | int | None, dtype: torch.dtype | None) -> None:
    settings = {"accelerator": "cpu", "precision": precision}
    require_free_keys(settings)
    if precision is not None:
        assert TrainerFactory(settings, None).autocast == dtype


def test_a_float16_model_is_not_computed_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    chosen = [TrainerFactory({"accelerator": "cpu"}, None, weights=kind).autocast for kind in ("float16", "bfloat16")]
    assert chosen == [None, torch.bfloat16]
    for precision, weights in (("bf16-mixed", "float16"), ("16", "bfloat16")):
        with pytest.raises(ConfigError, match=f"precision: {precision} does not go with model.dtype: {weights}"):
            require_one_half_type({"precision": precision}, weights)
    for precision, weights in ((None, "float16"), ("16-mixed", "float16"), ("bf16", "float32"), ("32", "bfloat16")):
        require_one_half_type({"precision": precision}, weights)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", 64])
def test_what_is_trained_stays_in_float32(precision: str | int) -> None:
    with pytest.raises(ConfigError, match=rf"trainer.precision: {precision}, .* take bf16-mixed"):
        require_free_keys({"precision": precision})


@pytest.mark.parametrize("made", [BlockwiseModule, CalibrationModule, EndToEndModule, EvaluationModule])
def test_a_stage_leaves_what_it_holds_where_it_is(made: type[pl.LightningModule]) -> None:
    """The device meta stands for a GPU: what lies there cannot be moved to the CPU."""
    module = made.__new__(made)
    pl.LightningModule.__init__(module)
    module.held = nn.Linear(2, 2, device="meta")
    strategy = TrainerFactory({"accelerator": "cpu"}, None).make().strategy
    strategy.connect(module)
    strategy.teardown()
    assert module.held.weight.device.type == "meta"


GRADIENTS = """
import lightning.pytorch as pl, torch
from torch import nn
from casp_pl.pipeline.launch import launched, leave
from casp_pl.pipeline.trainers import TrainerFactory, as_loader
from casp_pl.processes import of_all, process_rank

class Fixed(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(640, 640) for _ in range(4)))  # more than DDP sums at once
        self.x = torch.randn(3, 8, 640)[process_rank()]
        self.seen = []
    def training_step(self, batch):
        return self.model(self.x).square().mean()
    def on_after_backward(self):
        self.seen.append([parameter.grad.clone() for parameter in self.parameters()])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

trainer = {"accelerator": "cpu", "devices": 3, "strategy": "ddp"}
with launched(trainer):
    module = Fixed()
    TrainerFactory(trainer, None).make(max_steps=3).fit(module, as_loader([{}] * 3))
    for later in module.seen[1:]:
        assert all(torch.equal(one, other) for one, other in zip(module.seen[0], later, strict=True))
    alone = Fixed()
    mean = torch.stack([x.square().mean() for x in alone.model(torch.stack(of_all(module.x)))]).mean()
    for wanted, got in zip(torch.autograd.grad(mean, list(alone.parameters())), module.seen[0], strict=True):
        torch.testing.assert_close(got, wanted)
leave(0)
"""


@pytest.mark.slow
def test_the_first_step_of_several_processes_sums_as_later_ones_do(
    start_together: Callable[..., list[subprocess.Popen[bytes]]],
) -> None:
    """Else what a resumed run makes of its first step would differ in last bits."""
    for process in start_together(["-c", GRADIENTS], 3):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()


def test_only_evaluation_stays_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    factory = TrainerFactory({"accelerator": "cpu"}, None)
    assert factory.make().precision == "32-true"
    with factory.make(precision=factory.working_precision).precision_plugin.forward_context():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
