"""Folders in the run config, in MEGAKD_CACHE and in options: `~` is the home folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_files import message_of

from megakd.config.file import load_config
from megakd.inputs.run_data import cache_folder
from megakd.process.terminal import in_home


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_every_folder_of_the_config_may_begin_with_the_home_folder(run_file, home):
    overrides = [
        "output_dir=~/runs/x",
        "teacher.cache=~/answers",
        "train.resume_from_checkpoint=~/step-1",
        "teacher.finetune.resume_from_checkpoint=~/step-2",
        "baselines=[alone]",
        "alone.resume_from_checkpoint=~/step-3",
    ]

    config = load_config(run_file, overrides)

    assert config.output_dir == home / "runs/x"
    assert config.teacher.cache == home / "answers"
    trainings = (config.train, config.teacher.finetune, config.alone)
    assert [train.resume_from_checkpoint for train in trainings] == [
        str(home / f"step-{number}") for number in (1, 2, 3)
    ]


def test_the_home_folder_of_nobody_is_refused(run_file):
    key = "train.resume_from_checkpoint"
    text = message_of(run_file, f"{key}=~nosuchuser/x")

    assert f"{key}: ~nosuchuser is the home folder of a user that does not exist" in text
    assert "'~nosuchuser/x'" in text


@pytest.mark.parametrize("key", ["output_dir", "train.resume_from_checkpoint"])
def test_a_folder_without_a_name_is_not_the_current_one(run_file, key):
    assert f'{key}: must name a folder (got "")' in message_of(run_file, f"{key}=''")


@pytest.mark.parametrize(
    ("value", "folder"), [("", ".cache/megakd"), ("~", "."), ("~/fast/cache", "fast/cache")]
)
def test_an_empty_cache_variable_is_the_default_and_a_home_folder_is_expanded(
    home, monkeypatch, value, folder
):
    monkeypatch.setenv("MEGAKD_CACHE", value)

    assert cache_folder() == home / folder


@pytest.mark.parametrize(
    ("text", "path"),
    [("~/model", "me/model"), ("model/~", "model/~"), ("~no-such-user/x", "~no-such-user/x")],
)
def test_the_home_folder_is_put_in_where_a_path_begins_with_it(text, path, monkeypatch):
    monkeypatch.setenv("HOME", "me")

    assert in_home(text) == Path(path)
