"""What a divided model cannot have is refused before the model is read; the documented commands are not refused."""

import re
import shlex
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningArgumentParser

from casp_pl.cli import main, recipe_parsers, settings_from
from casp_pl.errors import ConfigError
from casp_pl.pipeline.divided import check_divided
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.strategies import chosen_wrapping

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(
    r"^ *(?:srun .*)?(?:torchrun (?:[^\n\\]|\\\n)*?-m|python -m) casp_pl (fit (?:[^\n\\]|\\\n)*)", re.M
)
DIVIDED = ["--trainer.devices", "2", "--trainer.strategy"]


@pytest.fixture(scope="module")
def parser() -> LightningArgumentParser:
    """The parser of fits; to build it takes longer than to parse."""
    return recipe_parsers()["fit"]


def parsed(parser: LightningArgumentParser, arguments: list[str]) -> RunSettings:
    return settings_from(parser, parser.parse_args(arguments))


@pytest.mark.parametrize("command", ["fit", "plan"])
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (["--model.streaming", "true"], "does not work with model.streaming"),
        (["--end_to_end.update_codes", "true"], "set end_to_end.update_codes to false"),
        (["--end_to_end.compile_backend", "inductor"], "set end_to_end.compile_backend to null"),
        (["--model.dtype", "float16"], "needs model.dtype float32, not float16"),
        (["--model.dtype", "bfloat16"], "needs model.dtype float32, not bfloat16"),
        (["--trainer.precision", "16-mixed"], "32-true or bf16-mixed, not 16-mixed"),
    ],
)
def test_refused_before_the_model_is_read(
    setting: list[str], words: str, strategy: str, command: str, recipe: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = [*recipe, "--model.source", "no/model", "--run_dir", str(tmp_path / "run"), *DIVIDED, strategy]
    assert main([command, *arguments, *setting]) == 2
    message = capsys.readouterr().err
    assert f"trainer.strategy {strategy} " in message
    assert words in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_model_that_turns_out_to_be_streamed_is_refused(parser: LightningArgumentParser, recipe: list[str]) -> None:
    settings = parsed(parser, [*recipe, *DIVIDED, "fsdp2"])
    check_divided(settings, streams=False)
    with pytest.raises(ConfigError, match=r"model\.streaming"):
        check_divided(settings, streams=True)


@pytest.mark.parametrize("way", [[*DIVIDED, "ddp"], ["--trainer.strategy", "fsdp2"], [*DIVIDED, "fsdp", "--steps"]])
def test_what_is_not_divided_is_free(way: list[str], parser: LightningArgumentParser, recipe: list[str]) -> None:
    """DDP, one process, and no end-to-end stage."""
    way = ["--end_to_end.steps=0" if word == "--steps" else word for word in way]
    check_divided(parsed(parser, [*recipe, "--model.dtype", "float16", *way]))


def test_documented_commands_are_not_refused(parser: LightningArgumentParser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    wrappings = []
    for found in COMMAND.findall((ROOT / "docs/distributed.md").read_text(encoding="utf-8")):
        settings = parsed(parser, shlex.split(found.replace("\\\n", " "))[1:])
        check_divided(settings)
        wrappings.append((chosen_wrapping(settings.trainer), int(settings.trainer["num_nodes"] or 1)))
    assert {("fsdp2", 1), ("fsdp2", 2), (None, 1), (None, 2)} <= set(wrappings), "all ways are documented"


@pytest.mark.parametrize("model", sorted((ROOT / "configs/models").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "strategy", sorted((ROOT / "configs/strategies").glob("fsdp*.yaml")), ids=lambda path: path.stem
)
def test_every_strategy_overlay_fits_every_model(strategy: Path, model: Path, parser: LightningArgumentParser) -> None:
    recipe = ROOT / f"configs/{'llama' if model.stem.startswith('llama') else 'llava'}_aqlm.yaml"
    overlays = [word for path in (recipe, model, strategy) for word in ("--config", str(path))]
    check_divided(parsed(parser, overlays))
