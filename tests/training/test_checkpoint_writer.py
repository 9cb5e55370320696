"""Checkpoints that are written beside the next steps."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_store import SHARD, checkpoints, names, states_of

from megakd.errors import CheckpointError
from megakd.training import checkpoint
from megakd.training.checkpoint import Checkpoints, CheckpointWriter


@pytest.fixture
def store(tmp_path) -> Checkpoints:
    return checkpoints(tmp_path)


class Held:
    """Holds every write of a file back until it is released, and can let it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released, self.error = threading.Event(), None
        self._write = checkpoint.write_files
        monkeypatch.setattr(checkpoint, "write_files", self._held)

    def _held(self, folder: Path, contents: Any) -> Any:
        assert self.released.wait(30)
        if self.error is not None:
            raise self.error
        return self._write(folder, contents)


@pytest.fixture
def held(monkeypatch) -> Held:
    return Held(monkeypatch)


class Training:
    """A weight and a state that every step changes."""

    def __init__(self, store: Checkpoints, *, beside: Any = True) -> None:
        self.writer = CheckpointWriter(store, beside=beside)
        self.weight, self.state = torch.zeros(4), {"average": torch.zeros(2), "steps": [0]}

    def step(self) -> None:
        self.weight += 1
        self.state["average"] += 1
        self.state["steps"][0] += 1

    def save(self, step: int, *, is_last: bool = False) -> None:
        states = states_of({"strategy": self.state})
        self.writer.save(step, {SHARD: {"weight": self.weight}}, states, is_last=is_last)


def stored(store: Checkpoints) -> tuple[float, dict[str, Any]]:
    values: dict[str, Any] = {"strategy": None}
    folder = store.newest_good()
    assert folder is not None
    store.load(folder, lambda _: None, states_of(values))
    return torch.load(folder / SHARD)["weight"][0].item(), values["strategy"]


def test_a_checkpoint_has_the_values_of_its_step_and_no_name_while_it_is_written(store, held):
    training = Training(store)
    training.step()
    training.save(1)
    training.step()

    assert (training.writer.is_pending, training.writer.is_writing) == (True, True)
    assert store.newest_good() is None
    held.released.set()
    training.writer.publish()

    assert (training.writer.is_pending, training.writer.is_writing) == (False, False)
    weight, state = stored(store)
    assert (weight, state["average"][0].item(), state["steps"]) == (1.0, 1.0, [1])


def test_the_next_save_and_the_last_one_wait_for_the_one_that_is_being_written(store, held):
    training = Training(store)
    training.save(1)
    threading.Timer(0.2, held.released.set).start()
    training.step()
    training.save(2)
    assert (store.folder / "step-1").is_dir()
    training.step()
    training.save(3, is_last=True)

    assert not training.writer.is_pending
    assert stored(store)[0] == 2.0
    assert names(store) == ["latest", "step-2", "step-3"]


def test_a_run_that_is_killed_while_it_writes_goes_on_from_the_checkpoint_before(store, held):
    killed = Training(store)
    held.released.set()
    killed.save(1, is_last=True)
    held.released.clear()
    killed.step()
    killed.save(2)

    assert store.newest_good() == store.folder / "step-1"
    assert names(store) == ["latest", "step-1", "step-2.partial"]
    held.released.set()
    killed.writer.close()
    again = Training(store)
    again.step()
    again.save(3, is_last=True)
    assert names(store) == ["latest", "step-1", "step-3"]


def test_a_full_disk_under_the_thread_is_told_when_the_checkpoint_would_get_its_name(store, held):
    training = Training(store)
    held.error = OSError(errno.ENOSPC, "No space left on device")
    training.save(8)
    held.released.set()

    message = r"checkpoint of step 8 could not be written .*No space left on device; nothing else"
    with pytest.raises(CheckpointError, match=message):
        training.writer.publish()

    assert names(store) == []
    assert not training.writer.is_pending


@pytest.mark.parametrize(("free", "beside"), [(10**6, True), (80, False)])
def test_a_copy_is_written_beside_the_training_if_the_free_memory_holds_it_twice(
    store, held, monkeypatch, caplog, free, beside
):
    caplog.set_level("INFO")
    monkeypatch.setattr(checkpoint, "free_memory_bytes", lambda _: free)
    training = Training(store, beside="auto")
    if not beside:
        held.released.set()

    training.save(1)

    assert training.writer.is_pending == beside
    assert ("saves stop the training" in caplog.text) != beside
    held.released.set()
    training.writer.close()
