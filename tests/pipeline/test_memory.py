"""Memory between the stages."""

import platform

import psutil
import pytest
import torch

from casp_pl.pipeline.memory import release_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to give memory back")
def test_freed_memory_between_kept_tensors_goes_back_to_the_system() -> None:
    tensors = [torch.ones(6000) for _ in range(20_000)]  # 480 MB, each too small to have pages of its own mapping
    kept = tensors[::50]
    del tensors
    before = psutil.Process().memory_info().rss
    release_memory()
    assert before - psutil.Process().memory_info().rss > 200e6
    assert all(bool((tensor == 1).all()) for tensor in kept)
