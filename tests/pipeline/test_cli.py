"""Bad input ends in at most three clear lines and the right exit code; every recipe fits the real signatures."""

import itertools
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser

from casp_pl.cli import build_parser, main
from casp_pl.models.tiny import load_tiny

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("configs/*.yaml"))
OVERLAYS = [[], *([path] for path in sorted(ROOT.glob("configs/*/*.yaml")) if path.parent.name != "evaluation")]
BENCHMARKS = sorted(ROOT.glob("configs/evaluation/*.yaml"))


@pytest.fixture(scope="module")
def parser() -> LightningArgumentParser:
    """The parser; to build it takes longer than to parse."""
    return build_parser()


@pytest.mark.parametrize(("recipe", "overlay"), list(itertools.product(RECIPES, OVERLAYS)))
def test_every_composition_parses(recipe: Path, overlay: list[Path], parser: LightningArgumentParser) -> None:
    arguments = ["fit", "--config", str(recipe)]
    for path in overlay:
        arguments += ["--config", str(path)]
    config = parser.parse_args(arguments)
    assert config.fit.bits.budget > 0


@pytest.mark.parametrize("overlay", BENCHMARKS)
def test_every_benchmark_parses(overlay: Path) -> None:
    arguments = ["test", "--config", str(ROOT / "configs/llava_aqlm.yaml"), "--config", str(overlay)]
    recipe = build_parser().parse_args(arguments).test
    assert recipe.evaluation.source.class_path.startswith("casp_pl.data.benchmarks.")
    assert recipe.scoring.class_path.startswith("casp_pl.evaluation.scoring.")
    assert "\n" in recipe.evaluation.source.init_args.prompt


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (["--bits.budgett", "2"], 2, ["budgett", "Did you mean", "budget"]),
        (["--trainer.max_epoch", "3"], 2, ["max_epoch"]),
        (["--bits.budget", "many"], 2, ["bits.budget"]),
        (["--bits.budget", "-1"], 2, ["budget", "-1"]),
        (["--bits.budget", "0.5"], 2, ["budget", "Feasible"]),
        (["--low_rank.keep_ratio", "1.5"], 2, ["keep_ratio", "1.5"]),
        (["--low_rank.keep_ratio", "0.01"], 2, ["rank 0"]),
        (["--trainer.accumulate_grad_batches", "2"], 2, ["trainer.accumulate_grad_batches", "data.batch_size"]),
        (["--trainer.fast_dev_run", "true"], 2, ["trainer.fast_dev_run", "tiny.yaml"]),
        (["--trainer.max_steps", "3"], 2, ["trainer.max_steps", "end_to_end.steps"]),
        (["--trainer.gradient_clip_val", "3"], 2, ["trainer.gradient_clip_val", "leave it out"]),
        (["--trainer.strategy", "dpd"], 2, ["dpd"]),
        (["--trainer.devices", "2", "--trainer.strategy", "deepspeed"], 2, ["trainer.strategy", "deepspeed", "ddp"]),
        (["--model.source", "no/such/model/here"], 3, ["model.source", "no/such/model/here"]),
        (["--config", "no_such.yaml"], 3, ["no_such.yaml"]),
        (["--data.samples", "0"], 2, ["data.samples"]),
        (["--data.source", "LlavaJson", "--data.source.path", "missing.json", "--data.source.image_folder", "."], 3,
         ["missing.json"]),
        (["--data.source.class_path", "os.system"], 2, ["os.system"]),
    ],
)  # fmt: skip
def test_bad_settings(
    extra: list[str], code: int, words: list[str], recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *recipe, "--run_dir", str(tmp_path / "run"), *extra]) == code
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 3
    for word in words:
        assert word in message


def test_yaml_with_python_tags_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: !!python/object/apply:os.system ['true']\n")
    assert main(["fit", "--config", str(bad)]) == 2
    assert "not plain YAML" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [TypeError, ValueError])
@pytest.mark.parametrize(
    "arguments",
    [["verify", "a"], ["report", "a"], ["explain", "q_proj"], ["export", "a", "--format", "gptq", "--out", "b"]],
    ids=lambda arguments: arguments[0],
)
def test_a_bug_in_a_command_is_no_bad_setting(
    arguments: list[str],
    kind: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object, **__: object) -> int:
        raise kind("zip() argument 2 is shorter")

    (tmp_path / "config.yaml").write_text("name: tiny\n")
    monkeypatch.setattr(f"casp_pl.pipeline.commands.{arguments[0]}", broken)
    assert main([*arguments, *(["--run_dir", str(tmp_path)] if arguments[0] == "explain" else [])]) == 1
    assert f"Unexpected {kind.__name__}: zip() argument 2 is shorter" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["verify"], ["report"], ["explain", "q_proj"], ["export", "a", "--format", "gguf", "--out", "b"]],
    ids=lambda arguments: arguments[0],
)
def test_bad_arguments_of_commands_without_a_recipe(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "Unexpected" not in message
    assert len(message.splitlines()) <= 3


def test_plan_is_a_dry_run(recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *recipe, "--run_dir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for word in ("q_proj", "bits per weight: 3.0", "memory: about", "time: about", "one block of this shape"):
        assert word in printed
    assert not (tmp_path / "run").exists()


def test_predict_answers_with_both_models(
    recipe: list[str], finished_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    arguments = ["--run_dir", str(finished_run), "--question", "is there a red shape?"]
    assert main(["predict", *recipe, *arguments, "--image", str(tmp_path / "red.png")]) == 0
    printed = capsys.readouterr().out
    assert "original: " in printed
    assert "compressed: " in printed
    assert main(["predict", *recipe, *arguments, "--image", str(tmp_path / "none.png")]) == 3
    assert "none.png: no such file" in capsys.readouterr().err


def test_validate_agrees_with_the_report(
    recipe: list[str], finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    assert main(["validate", *recipe, "--run_dir", str(finished_run)]) == 0
    assert "compressed" in capsys.readouterr().out
    validated = json.loads((finished_run / "validate.json").read_text())
    report = json.loads((finished_run / "report.json").read_text())
    for key in ("vqa_accuracy", "perplexity", "kl", "flip_rate"):
        assert validated["models"]["compressed"][key] == pytest.approx(report["stages"][-1][key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("command", [["test"], ["predict", "--question", "What is it?"]])
def test_another_original_than_that_of_the_run_is_refused(
    command: list[str], recipe: list[str], finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = load_tiny()
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    arguments = [*command, *recipe, "--run_dir", str(finished_run), "--model.source", str(tmp_path / "other")]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert f"is not the model that {finished_run} compressed" in message
    assert len(message.splitlines()) <= 3


def test_verify_finds_a_flipped_bit(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    path = copy / "blocks" / "000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["verify", str(copy)]) == 6
    assert "blocks/000.safetensors" in capsys.readouterr().out
