"""The directory of a model on the Hugging Face hub: fetched, or the copy that an earlier run fetched."""

import logging
import threading
from pathlib import Path

from casp_pl.errors import InputError

__all__ = ["hub_directory", "hub_label"]

_LOG = logging.getLogger(__name__)
_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt")  # never a pickle, never code
_WEIGHTS = ("*.safetensors",)
_SECONDS = 5.0  # to see whether the hub answers; the client's own retries would take minutes to give up


def hub_label(name: str, revision: str | None) -> str:
    """`org/name`, or `org/name@revision` where one was asked for."""
    return name if revision is None else f"{name}@{revision}"


def hub_directory(name: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """Where the files of `name` (org/model) lie on this machine, after fetching what is missing, with `weights` or not.

    `revision` is a branch, a tag or a commit; None is the hub's main branch.

    With HF_HUB_OFFLINE=1, or when the hub does not answer, the copy in the hub's cache is used.

    Raises:
        InputError: there is no such model, no access to it, or no way to reach it.
    """
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    wanted = [*_PATTERNS, *(_WEIGHTS if weights else ())]
    offline = is_offline_mode()
    reachable = not offline and _hub_answers(_SECONDS)
    try:
        directory = Path(
            snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=not reachable)
        )
    except Exception as error:  # whatever the client raises, the model is not here
        if reachable:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            absent = isinstance(error, RevisionNotFoundError)  # its first line says 404, no more
            reason = "the hub has no such revision of it" if absent else f"the hub says: {first}"
        else:
            reason = "HF_HUB_OFFLINE is set" if offline else "the hub is out of reach"
            reason += " and there is no copy in its cache"
        label = hub_label(name, revision)
        raise InputError(f"model.source: cannot load '{label}': {reason}. Give a local directory.") from error
    if not reachable and not offline:
        _LOG.warning("the hub is out of reach: %s is read from its cache", hub_label(name, revision))
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
