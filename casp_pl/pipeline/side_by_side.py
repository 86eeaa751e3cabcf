"""`test` and `validate`: original and compressed on the same samples, compared question by question."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from casp_pl.callbacks import Advance
from casp_pl.callbacks.comparison import ModelComparison, comparison_markdown, print_comparison
from casp_pl.callbacks.report import StageRow
from casp_pl.checkpoint import RunDirectory, load_compressed, write_text
from casp_pl.checkpoint.manifest import MANIFEST_NAME
from casp_pl.console import RunProgress, make_console, print_path
from casp_pl.errors import ConfigError, InputError
from casp_pl.evaluation import DecodeCost, PairedFigures, ReferenceOutputs, measure_decoding, resident_beside
from casp_pl.memory import release_memory
from casp_pl.models.adapter import ModelAdapter, adapt
from casp_pl.pipeline.launch import launched
from casp_pl.pipeline.measure import evaluation_module, stage_costs
from casp_pl.pipeline.prepare import Prepared, prepare
from casp_pl.pipeline.settings import RunSettings
from casp_pl.pipeline.trainers import TrainerFactory
from casp_pl.processes import is_first

__all__ = ["model_directory", "require_original_of_run", "side_by_side"]


class _Measured(NamedTuple):
    row: StageRow
    outputs: ReferenceOutputs
    paired: PairedFigures | None
    rule_figures: dict[str, float]
    decoding: DecodeCost
    beside: int


def side_by_side(settings: RunSettings, command: str) -> int:
    """Evaluate both models, print the comparison and write it; with a benchmark its name is part of the file's.

    Args:
        settings: the recipe.
        command: `test` or `validate`, the name of the files.

    Raises:
        InputError: there is no compressed model, or nothing to evaluate.
    """
    directory = model_directory(settings)
    with launched(settings.trainer):
        return _compare(settings, directory, command)


def _compare(settings: RunSettings, directory: Path, command: str) -> int:
    prepared = prepare(settings, digest=True)
    require_original_of_run(settings, prepared)
    device = prepared.device
    stages = {"evaluate original": 1.0, "evaluate compressed": 1.0}
    with RunProgress(stages, enabled=is_first(), verbose=settings.verbose) as progress:
        original = _measure("original", prepared.adapter, prepared.processor, settings, None, progress)
        del prepared  # two 7B models need not fit in memory together
        release_memory()
        model, processor = load_compressed(directory, device=device)
        settings.evaluation.attach(processor)
        compressed = _measure("compressed", adapt(model), processor, settings, original, progress)
    source = settings.evaluation.source
    comparison = ModelComparison(
        data="easy-VQA" if source is None else type(source).__name__,
        rule=type(settings.scoring).__name__,
        original=original.row,
        compressed=compressed.row,
        paired=compressed.paired,
        rule_original=original.rule_figures,
        rule_compressed=compressed.rule_figures,
        decode_original=original.decoding,
        decode_compressed=compressed.decoding,
    )
    if is_first():
        _publish(comparison, settings.run_dir, command if source is None else f"{command}_{comparison.data}")
    return 0


def model_directory(settings: RunSettings) -> Path:
    """Where `fit` has put the compressed model.

    Raises:
        InputError: it has not.
    """
    directory = settings.run_dir / "model"
    if not directory.is_dir():
        raise InputError(f"{directory} does not exist: run `fit` with this recipe first, or give --run_dir.")
    return directory


def require_original_of_run(settings: RunSettings, prepared: Prepared) -> None:
    """A compressed model is compared with the model that it was made from.

    Args:
        settings: the recipe.
        prepared: with the digest of its weights.

    Raises:
        ConfigError: the recipe's model is another one than that of the run.
    """
    run = settings.run_dir
    if (run / MANIFEST_NAME).exists() and RunDirectory.read_only(run).fingerprint.get("model") != prepared.weights:
        raise ConfigError(
            f"{settings.model.source} in {settings.model.dtype} is not the model that {run} compressed.\n"
            f"Give the recipe of that run: --config {run / 'config.yaml'}"
        )


def _measure(
    name: str,
    adapter: ModelAdapter,
    processor: Any,
    settings: RunSettings,
    original: _Measured | None,
    progress: RunProgress,
) -> _Measured:
    reference = None if original is None else original.outputs
    module = evaluation_module(adapter.model, processor, settings.evaluation, settings.scoring, reference)
    trainer = TrainerFactory(settings.trainer, None).make(callbacks=[Advance(progress.advance, loop="test")])
    with progress.stage(f"evaluate {name}", sum(map(len, settings.evaluation.test_dataloader()))):
        release_memory()  # what loading left behind is not the model's
        beside = resident_beside(adapter.model)
        more = 0 if original is None else beside - original.beside  # the original's outputs, and its evaluation's rest
        decoding = measure_decoding(adapter.model, beside=more)
        trainer.test(module, datamodule=settings.evaluation, verbose=False)
        if module.figures is None or module.outputs is None:
            raise InputError("evaluation: there is nothing to evaluate; set evaluation.questions or text_tokens.")
    costs = stage_costs("original" if original is None else "end_to_end", adapter, list(adapter.blocks))
    row = replace(costs, **module.figures.to_dict())
    return _Measured(row, module.outputs, module.comparison(), module.rule_figures(), decoding, beside)


def _publish(comparison: ModelComparison, folder: Path, stem: str) -> None:
    console = make_console()
    print_comparison(comparison, console)
    figures, text = folder / f"{stem}.json", folder / f"{stem}.md"
    write_text(figures, json.dumps(comparison.to_json(), indent=2, allow_nan=False) + "\n")
    write_text(text, comparison_markdown(comparison))
    print_path("figures:", figures, console)
    print_path("text:", text, console)
