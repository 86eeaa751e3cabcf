"""Samples that the original model cannot compute: found where sums show that there are some, left out, remembered."""

import logging
from collections.abc import Iterable
from typing import Any

import torch

from casp_pl.checkpoint import RunDirectory
from casp_pl.data import CalibrationData
from casp_pl.models.activations import Keep, in_memory
from casp_pl.models.adapter import ModelAdapter
from casp_pl.models.streams import autocast_to
from casp_pl.modules.finite import broken_samples, refuse_too_many_broken
from casp_pl.processes import is_first, of_all

__all__ = ["BrokenSamples"]

_LOG = logging.getLogger(__name__)
_NAME = "broken_samples.json"
_REASON = "NaN or infinite activations in the original model"


class BrokenSamples:
    """What a run leaves out of its data; a resumed run leaves out the same.

    Args:
        run: keeps the ids in broken_samples.json.
        adapter: the original model.
        data: loses the samples, and counts them as skipped.
        autocast: what the stages multiply matrices in; None for the dtype of the weights.
        keep: keeps activations.
    """

    def __init__(
        self,
        run: RunDirectory,
        adapter: ModelAdapter,
        data: CalibrationData,
        autocast: torch.dtype | None,
        keep: Keep = in_memory,
    ) -> None:
        self.run = run
        self.adapter = adapter
        self.data = data
        self.autocast = autocast
        self.keep = keep
        self._known: list[str] = []

    def recall(self) -> bool:
        """Leave out what an earlier process of this run found; whether that was anything."""
        if self.run.has(_NAME):
            self._known = list(self.run.read_json(_NAME))
            self.data.leave_out(self._known, _REASON)
        return bool(self._known)

    def search(self, batches: Iterable[dict[str, Any]]) -> bool:
        """Leave out the broken samples among these batches of this process; see `leave_out`."""
        with autocast_to(self.autocast, self.adapter.device):
            return self.leave_out(broken_samples(self.adapter, batches, self.keep))

    def leave_out(self, ids: Iterable[str]) -> bool:
        """Leave out the samples that any process has found to be broken; whether there were any.

        Raises:
            NumericsError: with them more than 1 % of all samples are broken.
        """
        found = sorted(set().union(*of_all({*ids})))
        if not found:
            return False
        counts = self.data.counts
        total = counts["fine_tuning_samples"] + counts["held_back_samples"] + len(self._known)
        self._known = sorted({*self._known, *found})
        refuse_too_many_broken(self._known, total)
        self.data.leave_out(found, _REASON)
        self.run.write_json(_NAME, self._known)
        if is_first():
            _LOG.warning("%d samples are left out: %s; the first is %s", len(found), _REASON, found[0])
        return True
