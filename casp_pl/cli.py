"""The command line: `python -m casp_pl COMMAND`; --help lists the commands.

Built on Lightning's argument parser: the arguments are the constructor arguments of the classes that do the work, so
their docstrings are the help and a recipe is checked against the real signatures. One fit is several LightningModules
on several Trainers, which is why it is not a `LightningCLI` (which runs one).
"""

import argparse
import difflib
import logging
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.cli import LightningArgumentParser

from casp_pl.callbacks import BitAllocation, CodebookUpdate, LowRankAllocation
from casp_pl.console import setup_logging
from casp_pl.data import CalibrationData
from casp_pl.data.evaluation import EvaluationData
from casp_pl.errors import ConfigError, InputError, StopRun
from casp_pl.evaluation.scoring import AnswerRule
from casp_pl.export import EXPORT_DTYPES, EXPORT_FORMATS
from casp_pl.harness import HARNESSES, run_harness
from casp_pl.memory import modules_kept_apart
from casp_pl.models.compress import BlockQuantization
from casp_pl.models.load import ModelSource
from casp_pl.modules import BlockwiseModule, CalibrationModule, EndToEndModule
from casp_pl.pipeline import commands
from casp_pl.pipeline.chat import Models
from casp_pl.pipeline.data_report import data
from casp_pl.pipeline.explain import ExplainSettings
from casp_pl.pipeline.failures import Failure, failure_of
from casp_pl.pipeline.launch import leave
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.trainers import require_free_keys, require_one_half_type
from casp_pl.pipeline.watch import ToldByFirstError
from casp_pl.quantizers import Quantizer

__all__ = ["build_parser", "main", "recipe_parsers", "run", "settings_from"]

_LOG = logging.getLogger(__name__)

COMMANDS: dict[str, tuple[Callable[..., int], str]] = {
    "fit": (commands.fit, "compress, fine-tune, evaluate and save a model; goes on where an earlier run stopped"),
    "plan": (commands.plan, "dry run: bits, sizes, memory and time before anything heavy happens"),
    "data": (data, "what enters: samples, tokens, what is skipped and why, a sheet of images with captions"),
    "validate": (commands.validate, "original and compressed side by side on the recipe's test questions"),
    "test": (commands.test, "the same on the whole test set"),
    "predict": (commands.predict, "answer a question about an image, or talk (--chat)"),
}
_OWN_ARGUMENTS = {
    "fit": ("override_memory",),
    "plan": ("json", "quick"),
    "data": ("out",),
    "predict": ("image", "video", "question", "chat", "models", "model_dir", "max_new_tokens"),
}
_ALLOWED_PACKAGES = ("casp_pl", "lightning", "torch")
_SOON = 0.05  # seconds


def recipe_parsers() -> dict[str, LightningArgumentParser]:
    """Command -> parser of its recipe, for every command that takes one."""
    return {name: _recipe_parser(name, text) for name, (_, text) in COMMANDS.items()}


def build_parser(recipes: Mapping[str, LightningArgumentParser] | None = None) -> LightningArgumentParser:
    """The parser with all subcommands.

    Args:
        recipes: what `recipe_parsers` made; None makes them here.
    """
    others = "lm_eval and lmms_eval MODEL_DIRECTORY --tasks ...: evaluate a compressed model with these packages."
    parser = _new_parser("2-bit large multimodal models.", prog="casp_pl", epilog=others)
    subcommands = parser.add_subcommands(required=True)
    for name, recipe in (recipe_parsers() if recipes is None else recipes).items():
        subcommands.add_subcommand(name, recipe, help=COMMANDS[name][1])
    explain = _add_plain(subcommands, "explain", "Why a linear of a run got its rank and bits.")
    explain.add_argument("module", type=str, help="name of a linear, or its end: layers.3.self_attn.q_proj")
    explain.add_argument("--run_dir", type=Path, required=True, help="runs/NAME, after calibration")
    verify = _add_plain(subcommands, "verify", "Check hashes and structure of a run or model directory.")
    verify.add_argument("directory", type=Path, help="runs/NAME or runs/NAME/model")
    report = _add_plain(subcommands, "report", "Make report.html, report.md and the pictures of a run again.")
    report.add_argument("directory", type=Path, help="runs/NAME, of a finished run or of one that was stopped")
    export = _add_plain(subcommands, "export", "Write a compressed model in the layout of another tool.")
    export.add_argument("directory", type=Path, help="runs/NAME or runs/NAME/model")
    export.add_argument("--format", choices=EXPORT_FORMATS, required=True, help="the layout")
    export.add_argument("--out", type=Path, required=True, help="a new directory")
    export.add_argument(
        "--dtype", choices=EXPORT_DTYPES, help="of everything but codes; default: float16 where that loses nothing"
    )
    return parser


def _new_parser(text: str, **settings: Any) -> LightningArgumentParser:
    # to import a class runs its module; asked whatever names one: recipe, command line, environment
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(_ALLOWED_PACKAGES))
    return LightningArgumentParser(description=text, exit_on_error=False, allow_abbrev=False, **settings)


def _add_plain(subcommands: Any, name: str, text: str) -> LightningArgumentParser:
    """A subcommand that takes no recipe."""
    parser = _new_parser(text)
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    subcommands.add_subcommand(name, parser, help=text[0].lower() + text[1:].removesuffix("."))
    return parser


def _recipe_parser(name: str, text: str) -> LightningArgumentParser:
    parser = _new_parser(text)
    parser.add_argument("--config", action="config", help="a recipe or overlay; later ones win")
    parser.add_argument("--name", type=str, default="casp", help="name of the recipe")
    parser.add_argument("--run_dir", type=Path | None, default=None, help="where to write; default runs/NAME")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of every random choice")
    parser.add_argument("--verbose", action="store_true", help="show all messages, and tracebacks of errors")
    parser.add_argument("--override_memory", action="store_true", help="start even where the plan says memory is short")
    parser.add_class_arguments(ModelSource, "model")
    parser.add_class_arguments(CalibrationData, "data")
    parser.add_class_arguments(EvaluationData, "evaluation")
    rule = {"class_path": "casp_pl.evaluation.scoring.ExactMatch"}
    parser.add_subclass_arguments(AnswerRule, "scoring", default=rule)
    _add_allocation(parser)
    parser.add_argument("--baseline", type=Quantizer | None, help="what every report compares with; null for nothing")
    parser.set_defaults({"baseline": {"class_path": "casp_pl.quantizers.RTNQuantizer"}})
    parser.add_argument("--baseline_bits", type=int, default=2, help="bits of the baseline")
    parser.add_class_arguments(BlockQuantization, "quantization", skip={"seed"})
    parser.add_argument(
        "--activations",
        type=Literal["auto", "memory", "disk"],
        default="auto",
        help="where inputs of blocks are kept: files in the run directory, or memory; auto: memory while there is room",
    )
    kwargs_only: dict[str, Any] = {"instantiate": False}
    parser.add_class_arguments(
        CalibrationModule,
        "calibration",
        skip={"adapter", "batches", "keep", "measure_rounding", "sensitivity"},
        **kwargs_only,
    )
    parser.add_class_arguments(
        BlockwiseModule, "block_tuning", skip={"blocks", "train", "held_back", "first", "seed"}, **kwargs_only
    )
    parser.add_argument("--block_tuning.window", type=PositiveInt, default=1, help="blocks that are tuned together")
    parser.add_class_arguments(EndToEndModule, "end_to_end", skip={"adapter", "teacher", "sharding"}, **kwargs_only)
    parser.add_argument(
        "--end_to_end.checkpoint_every",
        type=NonNegativeInt,
        default=10,
        help="steps between checkpoints; 0 for none but a stop's",
    )
    parser.add_class_arguments(CodebookUpdate, "codebook_update", **kwargs_only)
    parser.add_class_arguments(pl.Trainer, "trainer", fail_untyped=False, **kwargs_only)
    parser.set_defaults({"trainer.accelerator": "auto", "trainer.devices": 1})
    if name == "data":
        parser.add_argument(
            "--out", type=Path | None, default=None, help="the sheet, a PNG; default runs/NAME.data.png"
        )
    if name == "plan":
        parser.add_argument("--json", action="store_true", help="print everything as JSON")
        parser.add_argument("--quick", action="store_true", help="times from rates instead of one measured block")
    if name == "predict":
        _add_predict_arguments(parser)
    return parser


def _add_allocation(parser: LightningArgumentParser) -> None:
    parser.add_subclass_arguments(Quantizer, "quantizer", default={"class_path": "casp_pl.quantizers.AQLMQuantizer"})
    parser.add_class_arguments(LowRankAllocation, "low_rank")
    parser.add_class_arguments(BitAllocation, "bits")


def _add_predict_arguments(parser: LightningArgumentParser) -> None:
    parser.add_argument("--image", type=Path | None, default=None, help="an image file")
    parser.add_argument("--video", type=Path | None, default=None, help="a video file (PyAV), or a folder of frames")
    parser.add_argument("--question", type=str | None, default=None, help="what to ask about it")
    parser.add_argument("--chat", action="store_true", help="a conversation: one question a line of standard input")
    parser.add_argument(
        "--model_dir", type=Path | None, default=None, help="a compressed model, or a run: answers without a recipe"
    )
    parser.add_argument(
        "--models", type=Models | None, default=None, help="who answers; default both, with --model_dir compressed"
    )
    parser.add_argument("--max_new_tokens", type=PositiveInt, default=64, help="longest answer")


def settings_from(parser: LightningArgumentParser, chosen: Namespace) -> RunSettings:
    """Objects from a recipe that `parser`, one of `recipe_parsers`, has parsed."""
    flat = {key: str(value) for key, value in chosen.items() if key not in _NOT_IN_FINGERPRINT}
    recipe = parser.dump(chosen)
    built = parser.instantiate(chosen)
    fields = {key: built[key] for key in ("name", "data", "evaluation", "quantizer", "baseline", "baseline_bits")}
    fields |= {key: built[key] for key in ("scoring", "activations", "model", "low_rank", "bits", "quantization")}
    kwargs_only = ("calibration", "block_tuning", "end_to_end", "codebook_update", "trainer")
    fields |= {key: built[key].as_dict() for key in kwargs_only}
    require_free_keys(fields["trainer"])
    require_one_half_type(fields["trainer"], fields["model"].dtype)
    built["quantization"].seed = built["seed_everything"]
    return RunSettings(
        run_dir=built["run_dir"] or Path("runs") / built["name"],
        seed=built["seed_everything"],
        flat=flat,
        recipe=recipe,
        **fields,
    )


_NOT_IN_FINGERPRINT = frozenset(
    {"activations", "model.streaming"}  # where numbers lie does not change them
    | {"config", "run_dir", "verbose", "name"}
    | {argument for arguments in _OWN_ARGUMENTS.values() for argument in arguments}
    | {"trainer.devices", "trainer.num_nodes", "trainer.strategy"}  # a run may go on with more or fewer processes
    | {"end_to_end.checkpoint_every"}
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0 done, 2 configuration, 3 input, 4 numerics, 5 resources, 6 integrity, 130/143 signals, 1 a bug.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in arguments
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    hook, threading.excepthook = threading.excepthook, threading.excepthook if verbose else _thread_failed
    try:
        return _run(arguments, verbose)
    except ToldByFirstError as told:
        return told.exit_code
    except (Exception, StopRun) as error:
        return _fail(failure_of(error), verbose)
    finally:
        threading.excepthook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)


def run() -> NoReturn:
    """The program: a command, and the end of this process with its exit code."""
    leave(main())


def _run(arguments: list[str], verbose: bool) -> int:
    if arguments and arguments[0] in HARNESSES:  # they have messages and bars of their own
        return run_harness(arguments[0], arguments[1:])
    setup_logging(verbose=verbose)
    recipes = recipe_parsers()
    parser = build_parser(recipes)
    _check_files(arguments)
    try:
        config = parser.parse_args(arguments)
        command, chosen = config.subcommand, config[config.subcommand]
        if command in recipes:
            settings = settings_from(recipes[command], chosen)
            settings.verbose = verbose
            settings.command = shlex.join(["python", "-m", "casp_pl", *arguments])
            work: Callable[[], int] = partial(_on_recipe, command, settings, chosen)
        else:
            work = _plain_work(command, chosen)
    except (ArgumentError, argparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_short_reason(str(error), recipes, arguments)) from error
    return work()  # out here: what it raises is not about the arguments


def _on_recipe(command: str, settings: RunSettings, chosen: Namespace) -> int:
    extra = {key: chosen[key] for key in _OWN_ARGUMENTS.get(command, ())}
    with modules_kept_apart():
        return COMMANDS[command][0](settings, **extra)


def _plain_work(command: str, chosen: Namespace) -> Callable[[], int]:
    """A command that takes no recipe, with its arguments."""
    if command == "explain":
        return partial(commands.explain, _explain_settings(chosen.run_dir), chosen.module)
    if command == "export":
        return partial(commands.export, chosen.directory, chosen.out, chosen.format, dtype=chosen.dtype)
    return partial({"verify": commands.verify, "report": commands.report}[command], chosen.directory)


def _explain_settings(run_dir: Path) -> ExplainSettings:
    """What a finished calibration was asked for, out of the recipe that the run kept."""
    path = run_dir / "config.yaml"
    _check_recipe(path, f"{path}: no such file; give --run_dir of a run that has begun.")
    recipe = yaml.safe_load(path.read_text())
    parser = _new_parser("")
    _add_allocation(parser)
    built = parser.instantiate(
        parser.parse_object({key: recipe[key] for key in ("quantizer", "low_rank", "bits") if key in recipe})
    )
    return ExplainSettings(run_dir, built.quantizer, built.low_rank, built.bits)


def _check_files(arguments: Sequence[str]) -> None:
    """Configs must exist and be plain YAML."""
    values = [b for a, b in zip(arguments, arguments[1:], strict=False) if a == "--config"]
    values += [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    for path in map(Path, values):
        _check_recipe(path, f"--config {path}: no such file.")


def _check_recipe(path: Path, missing: str) -> None:
    if not path.is_file():
        raise InputError(missing)
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not plain YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, not {type(content).__name__}.")


def _short_reason(message: str, recipes: Mapping[str, LightningArgumentParser], arguments: Sequence[str]) -> str:
    """At most three lines, with the key that was probably meant."""
    foreign = re.search(r"Importing '([\w.]+)' is not allowed", message)
    if foreign:
        return f"{foreign[1]} is refused: only classes of {', '.join(_ALLOWED_PACKAGES)} are imported."
    file = re.search(r'key "([\w.]+)":\s+Config file loop detected: (.+) -> ', message)  # after it could not be used
    if file:
        allowed = ", ".join(_ALLOWED_PACKAGES)
        return f"{file[1]}: the class in {file[2]} cannot be used.\nIt has to be one for {file[1]}, of {allowed}."
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reason = " ".join(lines[:2])[:300]
    unknown = re.search(r"'([\w.]+)' is not expected|[Uu]nrecognized arguments: --([\w.]+)|Option '([\w.]+)'", message)
    if unknown:
        key = next(group for group in unknown.groups() if group)
        known = _known_keys(recipes, arguments)
        close = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(
            key.rsplit(".", 1)[-1], [name.rsplit(".", 1)[-1] for name in known], n=1
        )
        reason += f"\nDid you mean '{close[0]}'?" if close else "\nSee --help for the keys."
    return reason


def _known_keys(recipes: Mapping[str, LightningArgumentParser], arguments: Sequence[str]) -> list[str]:
    command = next((argument for argument in arguments if argument in recipes), "fit")
    return list(recipes[command].get_defaults().keys())


def _fail(failure: Failure, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print("\n".join(failure.message.splitlines()[:3]), file=sys.stderr)
    return failure.exit_code


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """One line instead of a traceback; TensorBoard's writer gives its error to the run at the next write."""
    _LOG.warning("%s in a thread: %s", failed.exc_type.__name__, failed.exc_value)


def _stop(number: int, frame: FrameType | None) -> None:
    if not _is_in_finalizer(frame):
        raise StopRun(number)
    # Python drops what a finalizer raises, and the run would go on: once more when it is over
    signal.signal(signal.SIGALRM, lambda _, later: _stop(number, later))
    signal.setitimer(signal.ITIMER_REAL, _SOON)


def _is_in_finalizer(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None
