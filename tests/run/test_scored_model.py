"""The model that `megakd evaluate` scores: where it is, and what reading it may do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from whole_run import WholeRun

ALLOWED = "student.allow_pickle=true"


def pickled(folder: Path, copy: Path) -> Path:
    """The model with its weights in a pickle file."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checksums.json"))
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    return copy


def test_pickle_weights_are_scored_with_the_setting_that_the_message_names(
    one_rank, whole_run: WholeRun, tmp_path: Path
) -> None:
    model = pickled(whole_run.out / "final", tmp_path / "model")
    words = ("evaluate", whole_run.config, "--json", "--model")
    refused = one_rank.megakd(*words, model)
    allowed = one_rank.megakd(*words, model, ALLOWED)

    assert refused.code == 2
    assert f"(--model): {model} has only pickle weights" in refused.err
    assert "convert them to safetensors or set student.allow_pickle: true" in refused.err
    assert allowed.code == 0, allowed.err
    original = one_rank.megakd(*words, whole_run.out / "final")
    assert json.loads(allowed.out)["metrics"] == json.loads(original.out)["metrics"]


@pytest.mark.parametrize("place", ["~/model", "~"])
def test_a_model_in_the_home_folder_is_found(
    whole_run: WholeRun, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megakd.config.file import load_config
    from megakd.run.scored_model import model_folder

    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))

    folder = model_folder(load_config(whole_run.config), place)

    assert folder == Path(place).expanduser()
