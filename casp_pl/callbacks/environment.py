"""What a figure depends on besides the config: versions, source commit, memory."""

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from casp_pl.kernels.compiled import backend_name
from casp_pl.linalg.orthogonal import transform_name

__all__ = ["backend_parts", "machine_parts", "package_versions", "peak_memory_bytes", "source_commit"]

_PACKAGES = ("casp_pl", "torch", "lightning", "transformers", "torchmetrics", "safetensors", "tokenizers", "numpy")


def package_versions() -> dict[str, str]:
    """Python's version and those of the packages that figures depend on; one that is not installed is left out."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def source_commit() -> str | None:
    """Commit of the source tree of this package, with `-dirty` if files differ from it; None outside a git clone."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def machine_parts() -> dict[str, str]:
    """What the run computes on: system, processor, threads, memory, and the accelerator if there is one."""
    parts = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads",
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
    }
    if torch.cuda.is_available():
        parts["accelerator"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return parts


def backend_parts(device: torch.device, *, transforms: bool) -> dict[str, str]:
    """Which code a run computes with, where there are several.

    Args:
        device: where the model computes.
        transforms: whether the run's layers have Hadamard transforms.
    """
    parts = {"kernels": backend_name(device)}
    return parts | {"Hadamard transform": transform_name(device)} if transforms else parts


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, plus the largest allocation on the current CUDA device."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return resident + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
