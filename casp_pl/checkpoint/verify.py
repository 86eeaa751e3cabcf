"""Check a run directory or a model directory without changing or trusting anything in it."""

from pathlib import Path

from casp_pl.checkpoint.manifest import MANIFEST_NAME, Manifest
from casp_pl.checkpoint.model_directory import CONFIG_NAME, directory_problems
from casp_pl.errors import InputError, IntegrityError

__all__ = ["verify"]


def verify(path: Path | str) -> list[str]:
    """Everything that is wrong, one sentence each; an empty list where all is sound.

    A run directory is checked against its manifest, and so is every model directory below it; a model directory is
    also checked for structure (config, index, safetensors headers, no pickles).

    Args:
        path: a run directory or a model directory.

    Raises:
        InputError: there is no such directory.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory; give a run directory or a model directory.")
    if (directory / CONFIG_NAME).is_file():
        return directory_problems(directory)
    try:
        manifest = Manifest.load(directory)
    except IntegrityError as error:
        return [str(error)]
    problems = [f"{directory / name} {problem}." for name, problem in manifest.problems(directory).items()]
    inner = sorted(found.parent for found in directory.glob(f"*/{MANIFEST_NAME}"))
    for model in inner:
        problems += [problem for problem in directory_problems(model) if problem not in problems]
    return problems
