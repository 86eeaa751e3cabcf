"""Metrics whose states are lists of float64 tensors, in every process."""

import torch
from torchmetrics import Metric

__all__ = ["WideMetric"]


class WideMetric(Metric):
    """A process that has seen nothing sends empty float64 tensors, as the others do; gloo takes no other dtype.

    torchmetrics has `set_dtype` for that, but every `Module.to` sets the dtype of a metric back to float32.
    """

    full_state_update = False

    @property
    def dtype(self) -> torch.dtype:
        """That of all states."""
        return torch.float64
