"""Runs of the whole-model benchmark lie by commit."""

import re

import pytest

from benchmarks import whole_model


@pytest.mark.parametrize(
    ("commit", "name"), [("0a1b", "0a1b"), ("0a1b-dirty", r"0a1b-dirty-\d+-\d+"), (None, r"unknown-\d+-\d+")]
)
def test_only_a_clean_commit_finds_its_runs_again(commit, name, tmp_path, monkeypatch):
    monkeypatch.setattr(whole_model, "source_commit", lambda: commit)
    folder = whole_model.commit_folder(tmp_path)
    assert folder.parent == tmp_path
    assert re.fullmatch(name, folder.name)
