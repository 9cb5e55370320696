"""Uploads to the Hub, through a stand-in of its client, and a Hub that does not answer."""

from __future__ import annotations

import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from checkpoint_store import ALONE
from huggingface_hub import constants

from megakd.commands.shrink import recipe
from megakd.config.run import SaveConfig
from megakd.config.task import TaskConfig
from megakd.data.hub import silent_hub
from megakd.data.splits import load_splits
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import ConfigError, DataError, ModelError
from megakd.models.loading import resolve_model
from megakd.run import main

PRIVATE = SaveConfig(push_to_hub="me/student", hub_private=True)


class Api:
    """`HfApi` with the calls that are used."""

    def __init__(self):
        self.calls, self.failing = [], ()

    def __getattr__(self, name):
        def call(*positions, **options):
            if name in self.failing:
                raise OSError(f"{name} failed\nand more")
            self.calls.append((name, *positions, options))

        return call


@pytest.fixture
def api(monkeypatch):
    made = Api()
    monkeypatch.setattr(main, "HfApi", lambda: made)
    return made


def test_the_token_is_checked_before_a_run_starts(api, monkeypatch):
    main.check_hub(PRIVATE)
    assert api.calls == [("whoami", {})]
    api.failing = ("whoami",)
    with pytest.raises(ConfigError, match=r"save.push_to_hub: me/student .*hf auth login"):
        main.check_hub(PRIVATE)
    # The real client, without network.
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", "none")
    with pytest.raises(ConfigError, match=r"save\.push_to_hub: .*the check failed"):
        main.check_hub(PRIVATE)


def test_the_folder_goes_to_a_repository_that_is_made_first(api, tmp_path):
    answer = main.push_to_hub(PRIVATE, tmp_path)

    assert answer == "the student was uploaded to https://huggingface.co/me/student"
    (made, repository, options), (uploaded, what) = api.calls
    assert (made, repository, uploaded) == ("create_repo", "me/student", "upload_folder")
    assert options == {"private": True, "exist_ok": True}
    assert (what["repo_id"], what["folder_path"]) == ("me/student", tmp_path)


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_a_failed_upload_is_one_line_with_the_command_that_repeats_it(api, tmp_path, step):
    api.failing = (step,)

    answer = main.push_to_hub(PRIVATE, tmp_path / "a run")

    assert answer == (
        f"the student was not uploaded to me/student ({step} failed); upload it with: "
        f"hf upload me/student '{tmp_path}/a run' --private"
    )


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_uploads_when_no_other_rank_waits_for_it(api, monkeypatch, tmp_path, finished):
    happened: list[str] = []

    @contextmanager
    def noting(word, value=None):
        yield value
        happened.append(word)

    parts = {
        "started": lambda _: noting("left the group", ALONE),
        "locked_on_main": lambda _: noting("released the folder"),
        "on_main": lambda work: work(),
        "fingerprint_of": lambda *_: {},
        "check_output_folder": lambda _: None,
        "_run": lambda *_: "table",
        "finished_table": lambda *_: "table" if finished else None,
        "push_to_hub": lambda *_: happened.append("uploaded") or "uploaded",
    }
    for name, part in parts.items():
        monkeypatch.setattr(main, name, part)
    config: Any = SimpleNamespace(save=PRIVATE, output_dir=tmp_path)

    outcome = main.run(config, command="train")

    assert outcome == "table\nuploaded"
    released = [] if finished else ["released the folder"]
    assert happened == ["left the group", "uploaded", *released]


@pytest.fixture
def no_network(monkeypatch):
    """A Hub whose machine refuses connections; no library may wait to ask it again."""

    def waits(_):
        pytest.fail("a library repeats a request to a Hub that does not answer")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", waits)
    silent_hub.cache_clear()
    yield
    silent_hub.cache_clear()


def test_a_hub_that_does_not_answer_is_asked_once(no_network, tmp_path):
    task = TaskConfig(type="mlm", dataset="someone/texts", tokenizer="someone/model")
    silent = r"http://127\.0\.0\.1:9 does not answer \(.*refused"

    assert recipe("someone/model", size={"flops": "10%"})["method"]
    with pytest.raises(DataError, match=rf"texts, and it is not in the local cache: {silent}"):
        load_splits(task, seed=1, cache_dir=tmp_path)
    with pytest.raises(DataError, match=rf"cannot be loaded from the Hub: {silent}"):
        load_tokenizer(task, cast("Any", None), model_folders=[], cache_dir=tmp_path)
    with pytest.raises(ModelError, match=rf"cannot be downloaded from the Hub \({silent}"):
        resolve_model("someone/model", task, where="teacher.model")
