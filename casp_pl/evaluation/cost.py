"""What a model costs while it answers: tokens a second one at a time, and memory."""

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from casp_pl.memory import release_memory

__all__ = ["DecodeCost", "measure_decoding", "resident_beside", "tensor_bytes"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class DecodeCost:
    """Measured on one sequence, with the layers as they are stored.

    Attributes:
        tokens_per_second: new tokens a second after the prompt, the median of the repetitions.
        weights_bytes: weights and buffers as they lie in memory.
        peak_memory_bytes: largest resident size of the process meanwhile, or on a GPU the largest allocation, without
            what it holds for other purposes; None where the system does not tell. The Python libraries are part of it.
    """

    tokens_per_second: float
    weights_bytes: int
    peak_memory_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, ready for JSON."""
        return asdict(self)


@torch.no_grad()
def measure_decoding(
    model: Any, *, prompt: int = 16, tokens: int = 32, repetitions: int = 3, beside: int = 0
) -> DecodeCost:
    """Decode greedily from a prompt of text, one token a step; the first repetition warms up and does not count.

    Args:
        model: on its device, in evaluation mode.
        prompt: tokens of the prompt.
        tokens: new tokens that are timed.
        repetitions: how often.
        beside: bytes that the process has come to hold for other purposes, see `resident_beside`.
    """
    device = next(model.parameters()).device
    ids = torch.arange(prompt, device=device)[None] % model.get_input_embeddings().num_embeddings
    _decode(model, ids, tokens)  # compiles what is compiled at first use
    release_memory()  # what that took beside is not the model's
    restarted = _start_peak(device)
    times = [_decode(model, ids, tokens) for _ in range(repetitions)]
    peak = _peak(device) - beside if restarted else None
    return DecodeCost(tokens / statistics.median(times), tensor_bytes(model), peak)


def resident_beside(model: nn.Module) -> int:
    """Bytes that the process holds now and that are not this model's: its libraries, and what earlier work left.

    0 on a GPU, where only allocations are counted, and where the system does not tell.
    """
    if next(model.parameters()).device.type == "cuda" or not _STATUS.is_file():
        return 0
    return max(0, _status("VmRSS") - tensor_bytes(model))


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers in memory, tied ones once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values() if tensor.numel()}
    return sum(tensors.values())


def _decode(model: Any, ids: Tensor, tokens: int) -> float:
    """Seconds of `tokens` steps after the prompt."""
    head = model.get_output_embeddings()
    output = model.model(input_ids=ids, use_cache=True)
    _finish(ids.device)
    start = time.perf_counter()
    for _ in range(tokens):
        token = head(output.last_hidden_state[:, -1:]).argmax(-1)
        output = model.model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    _finish(ids.device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_peak(device: torch.device) -> bool:
    """Let the peak start again from here; whether that is possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _RESET.write_text("5")
    except OSError:  # not Linux, or a container that does not allow it
        return False
    return True


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
