"""Activations kept in files: equal tensors, no name left behind, a full disk told in words."""

from pathlib import Path

import psutil
import pytest
import torch

from casp_pl.errors import ResourceError
from casp_pl.models.activations import ActivationStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_is_kept_on_disk_is_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    store = ActivationStore("disk", tmp_path / "run")
    tensor = torch.randn(3, 5, 7).mul(100).to(dtype)
    kept = store(tensor[:, 1:])
    assert torch.equal(kept, tensor[:, 1:])
    assert kept.dtype == dtype
    assert not list((tmp_path / "run").iterdir()), "the file has no name any more"
    assert store.bytes_on_disk == tensor[:, 1:].nbytes
    assert store(torch.empty(0, 4)).shape == (0, 4)


def test_auto_leaves_the_reserve_free(tmp_path: Path) -> None:
    tensor = torch.randn(8)
    assert ActivationStore("memory", tmp_path)(tensor) is tensor
    assert ActivationStore("auto", tmp_path)(tensor) is tensor
    assert ActivationStore("auto", tmp_path, reserve=1 << 60)(tensor) is not tensor
    available = psutil.virtual_memory().available
    assert ActivationStore("auto", tmp_path, reserve=available // 8, sharing=2)(tensor) is tensor
    assert ActivationStore("auto", tmp_path, reserve=available // 8, sharing=16)(tensor) is not tensor


def test_a_full_disk_names_path_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ResourceError, match=r"32 bytes of activations in .*tmp-activations") as caught:
        ActivationStore("disk", tmp_path)(torch.randn(8))
    assert len(str(caught.value).splitlines()) <= 3
    assert not list(tmp_path.iterdir())
