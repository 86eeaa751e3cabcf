"""What a figure depends on besides the config: versions, source commit, memory."""

import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["package_versions", "peak_memory_bytes", "source_commit"]

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


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, plus the largest allocation on the current CUDA device."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return resident + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
