"""`python -m casp_pl lm_eval DIRECTORY ...`: a harness's own command line with a model that we saved."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from casp_pl.checkpoint.model_directory import is_compressed_model
from casp_pl.errors import CaspError, ConfigError, InputError

__all__ = ["HARNESSES", "run_harness", "said_by_us"]


class _Said(BaseException):  # noqa: N818  # no Exception: lmms-eval would print it, go on and exit with 0
    def __init__(self, error: CaspError) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def said_by_us() -> Iterator[None]:
    """Errors of ours inside of it end the harness and reach `run_harness`."""
    try:
        yield
    except CaspError as error:
        raise _Said(error) from error


def _lm_eval() -> Callable[[], None]:
    import_module("casp_pl.harness.lm_eval_model")
    from lm_eval.__main__ import cli_evaluate

    return cli_evaluate  # type: ignore[no-any-return]


def _lmms_eval() -> Callable[[], None]:
    from lmms_eval.cli.dispatch import main
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    path = "casp_pl.harness.lmms_eval_model.CaspMultimodalModel"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("casp", simple_class_path=path), overwrite=True)
    return main  # type: ignore[no-any-return]


HARNESSES = {"lm_eval": _lm_eval, "lmms_eval": _lmms_eval}


def run_harness(name: str, arguments: Sequence[str]) -> int:
    """Run a harness on a compressed model; it prints and writes its own results.

    Args:
        name: one of `HARNESSES`.
        arguments: the model directory, then options of the harness, `--tasks` above all.

    Raises:
        ConfigError: the harness is not installed, or there is no directory.
        InputError: the directory holds no compressed model.
        CaspError: what the model said inside the harness.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"usage: python -m casp_pl {name} runs/NAME/model --tasks TASK [options of {name}]")
    directory = Path(arguments[0])
    if not is_compressed_model(directory):
        raise InputError(f"{directory} holds no model that casp_pl compressed; give runs/NAME/model.")
    try:
        main = HARNESSES[name]()
    except ImportError as error:
        raise ConfigError(
            f"{name} cannot be imported ({error})\nInstall it with: pip install 'casp_pl[eval]'"
        ) from error
    before = sys.argv
    sys.argv = [name, "--model", "casp", "--model_args", f"pretrained={directory}", *arguments[1:]]
    try:
        main()
    except _Said as said:
        raise said.error from said
    finally:
        sys.argv = before
    return 0
