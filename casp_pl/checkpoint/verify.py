"""Check a run directory or a model directory without changing or trusting anything in it."""

import re
from collections.abc import Iterator
from pathlib import Path

from casp_pl.allocation import CompressionPlan
from casp_pl.checkpoint.contents import block_problems, content_problems
from casp_pl.checkpoint.manifest import MANIFEST_NAME, Manifest
from casp_pl.checkpoint.model_directory import (
    CONFIG_NAME,
    check_layout,
    check_weights,
    is_compressed_model,
    unsafe_files,
)
from casp_pl.checkpoint.reading import read_json
from casp_pl.errors import ConfigError, InputError, IntegrityError

__all__ = ["verify"]

_BLOCK = re.compile(r"(blocks|tuned|end_to_end)/\d{3}\.safetensors")
_PLAN_NAME = "plan.json"


def verify(path: Path | str) -> list[str]:
    """Everything that is wrong, one sentence each; an empty list where all is sound.

    Checked are hashes; that nothing is a pickle or a link to the outside, at any depth; of a model, in this package's
    layout or that of an export, that its files hold every tensor of which config.json speaks and no other, in shape and
    type, with numbers that can be; and of a run, the same of its blocks by plan.json, and of its model. One tensor at a
    time is read.

    Args:
        path: a run directory or a model directory.

    Raises:
        InputError: there is no such directory.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory; give a run directory or a model directory.")
    unsafe = unsafe_files(directory)
    if (directory / CONFIG_NAME).is_file():
        return unsafe + _model_problems(directory, read=not unsafe)
    return unsafe + _run_problems(directory, read=not unsafe)


def _run_problems(directory: Path, *, read: bool) -> list[str]:
    """Of a run, its blocks and its model; what is not recorded does not count."""
    try:
        manifest = Manifest.load(directory)
    except IntegrityError as error:
        return [str(error)]
    problems = _changed(directory, manifest)
    if read:
        problems += _block_problems(directory, manifest)
    for config in sorted(directory.glob(f"*/{CONFIG_NAME}")):
        problems += [problem for problem in _model_problems(config.parent, read=read) if problem not in problems]
    return problems


def _model_problems(directory: Path, *, read: bool) -> list[str]:
    """Of a model directory; its weights are read only where nothing in it is unsafe."""

    def look() -> Iterator[str]:
        (check_layout if is_compressed_model(directory) else check_weights)(directory)
        if read:
            yield from content_problems(directory)

    problems = _found(look())
    try:
        manifest = Manifest.load(directory)
    except IntegrityError as error:
        return [*problems, str(error)]
    strangers = sorted(path for path in directory.glob("*.safetensors") if path.name not in manifest.artifacts)
    return problems + _changed(directory, manifest) + [f"{path} is not in {MANIFEST_NAME}." for path in strangers]


def _changed(directory: Path, manifest: Manifest) -> list[str]:
    return [f"{directory / name} {problem}." for name, problem in manifest.problems(directory).items()]


def _block_problems(directory: Path, manifest: Manifest) -> list[str]:
    try:
        plan = _plan(directory) if _PLAN_NAME in manifest.artifacts else None
    except IntegrityError as error:
        return [str(error)]
    blocks = [directory / name for name in sorted(manifest.artifacts) if _BLOCK.fullmatch(name)]
    return [problem for path in blocks for problem in _found(block_problems(path, plan))]


def _plan(directory: Path) -> CompressionPlan:
    try:
        return CompressionPlan.from_json(read_json(directory / _PLAN_NAME))
    except (IntegrityError, ConfigError) as error:
        raise IntegrityError(f"{directory / _PLAN_NAME}: {error}") from error


def _found(look: Iterator[str]) -> list[str]:
    """What a look finds; where it cannot go on, with the reason why."""
    problems: list[str] = []
    try:
        problems += look
    except IntegrityError as error:
        problems.append(str(error))
    return problems
