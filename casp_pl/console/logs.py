"""Messages and warnings: ours on stderr in one line each; the known noise of other packages only with --verbose."""

import logging
import os
import sys
import warnings
from functools import partialmethod
from importlib import import_module

from tqdm.std import tqdm

__all__ = ["setup_logging"]

_QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",  # "torchvision is not available": the PIL processor is the one we use
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else a warning at every fork of a data loader
}

_NOISE = (
    r".*does not have many workers.*",  # batches are made from small cached inputs: workers would only cost memory
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # Lightning with torch 2.13
    r".*torch\.jit\.script.* is deprecated.*",  # aqlm 1.1.7 with torch 2.13
    r".*Checkpoint directory .* exists and is not empty.*",  # so it should be when a run is resumed
    r".*Found \d+ module\(s\) in eval mode at the start of training.*",  # frozen teachers
)
_FOREIGN = (
    "lightning",
    "lightning_utilities",
    "transformers",
    "datasets",
    "torch",
    "matplotlib",
    "PIL",
    "fsspec",
    "tensorboard",
)
_OWN_HANDLERS = (
    "lightning.pytorch",
    "lightning.fabric",
)  # the logger above them has a handler of its own: no line twice


def setup_logging(*, verbose: bool = False) -> None:
    """Sets up messages, warnings and the bars of other packages for a whole process: for commands, not for libraries.

    Args:
        verbose: show everything, other packages' notes and warnings included.
    """
    handler = _StderrHandler(verbose=verbose)
    for name in ("", *_OWN_HANDLERS):
        logger = logging.getLogger(name)
        logger.handlers = [other for other in logger.handlers if not isinstance(other, _StderrHandler)]
        logger.addHandler(handler)
    for name in _OWN_HANDLERS:
        logging.getLogger(name).propagate = False
    logging.getLogger().setLevel(logging.INFO)
    logging.captureWarnings(True)
    if verbose:
        return
    for name in ("lightning.pytorch", "lightning.fabric"):  # these two have handlers of their own
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=pattern)
    for name, value in _QUIET_ENVIRONMENT.items():  # for processes that this one starts
        os.environ.setdefault(name, value)
    _quiet_transformers()
    _no_foreign_bars()


def _quiet_transformers() -> None:
    """Transformers reads its environment variables when it is imported, and it may be imported already."""
    if "transformers" in sys.modules:
        foreign = import_module("transformers.utils.logging")
        foreign.set_verbosity_error()
        foreign.disable_progress_bar()


def _no_foreign_bars() -> None:
    """The run has its own bars. Tqdm, too, reads its variable TQDM_DISABLE only when it is imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    start = vars(tqdm)["__init__"]
    if not getattr(start, "keywords", {}).get("disable"):
        tqdm.__init__ = partialmethod(start, disable=True)


class _StderrHandler(logging.Handler):
    """Writes to what sys.stderr is at the time: a live progress bar puts itself in its place while it is shown."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__(logging.NOTSET)
        self.verbose = verbose
        self.setFormatter(logging.Formatter("%(name)s: %(message)s" if verbose else "%(message)s"))

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown: always ours and warnings, other packages' notes only when verbose."""
        return self.verbose or record.levelno >= logging.WARNING or record.name.split(".")[0] not in _FOREIGN

    def emit(self, record: logging.LogRecord) -> None:
        """One line; `warning:` or `error:` in front where it is one."""
        label = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        try:
            print(label + self.format(record).rstrip(), file=sys.stderr, flush=True)
        except (OSError, ValueError):
            self.handleError(record)
