"""The directory of a model on the Hugging Face hub: fetched, or the copy that an earlier run fetched."""

import logging
import threading
from pathlib import Path

from casp_pl.errors import InputError

__all__ = ["hub_directory"]

_LOG = logging.getLogger(__name__)
_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt")  # never a pickle, never code
_WEIGHTS = ("*.safetensors",)
_SECONDS = 5.0  # to see whether the hub answers; the client's own retries would take minutes to give up


def hub_directory(name: str, *, weights: bool = True) -> Path:
    """Where the files of `name` (org/model) lie on this machine, after fetching what is missing, with `weights` or not.

    With HF_HUB_OFFLINE=1, or when the hub does not answer, the copy in the hub's cache is used.

    Raises:
        InputError: there is no such model, no access to it, or no way to reach it.
    """
    from huggingface_hub import is_offline_mode, snapshot_download

    wanted = [*_PATTERNS, *(_WEIGHTS if weights else ())]
    offline = is_offline_mode()
    reachable = not offline and _hub_answers(_SECONDS)
    try:
        directory = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=not reachable))
    except Exception as error:  # whatever the client raises, the model is not here
        if reachable:
            reason = f"the hub says: {(str(error).splitlines() or [type(error).__name__])[0]}"
        else:
            reason = "HF_HUB_OFFLINE is set" if offline else "the hub is out of reach"
            reason += " and there is no copy in its cache"
        raise InputError(f"model.source: cannot load '{name}': {reason}. Give a local directory.") from error
    if not reachable and not offline:
        _LOG.warning("the hub is out of reach: %s is read from its cache", name)
    return directory


def _hub_answers(seconds: float) -> bool:
    """Whether the hub answers in time, asked on a thread of its own: name resolution knows no time limit."""
    answered = threading.Event()
    done = threading.Event()

    def ask() -> None:
        from huggingface_hub import constants, get_session

        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
            answered.set()
        except Exception as error:  # any failure is the answer
            _LOG.debug("the hub does not answer: %s", error)
        finally:
            done.set()

    threading.Thread(target=ask, daemon=True).start()
    done.wait(seconds)
    return answered.is_set()
