"""Checkpoints are whole or absent, checked before they are used, and never destroy one another."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megakd import checkpoint as checkpoint_module
from megakd.atomic import write_text
from megakd.checkpoint import Checkpoints, seed_everything, write_tensors
from megakd.engine import distributed
from megakd.engine.distributed import Ranks
from megakd.engine.student import CarefulWriter
from megakd.errors import CheckpointError

ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
SHARD = "shard.pt"
FILES = (SHARD, "state.pt", "rank-0.pt")


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank without a process group."""
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)


def checkpoints(folder: Path, *, keep: int | None = 2, ranks: Ranks = ALONE, **fields: Any) -> Any:
    fingerprint = {"train.learning_rate": 0.1, "seed": 1} | fields
    return Checkpoints(folder=folder / "student", fingerprint=fingerprint, keep=keep, ranks=ranks)


def write_engine(folder: Path, tag: str) -> None:
    write_tensors(folder / tag / SHARD, {"weight": torch.arange(1000.0)})


def save(store: Checkpoints, *steps: int) -> Path:
    for step in steps:
        written = store.save(step, write_engine, {"step": step}, {"window": step * 10})
    return written


def names(store: Checkpoints) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def read_nothing(folder: Path, tag: str) -> None:
    del folder, tag


def draws() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002


def test_state_and_random_numbers_come_back_after_the_shards_are_read(tmp_path):
    store = checkpoints(tmp_path)
    seed_everything(3, rank=0)
    folder = save(store, 4)
    wanted = draws()

    def read_shards(parent: Path, tag: str) -> None:
        assert (parent / tag / SHARD).is_file()
        draws()

    state, own = store.load(folder, read_shards)

    assert (state, own) == ({"step": 4}, {"window": 40})
    assert draws() == wanted


def test_ranks_draw_different_dropout_and_the_same_everything_else():
    seed_everything(3, rank=0)
    first = draws()
    seed_everything(3, rank=1)
    second = draws()

    assert first[:2] == second[:2]
    assert first[2] != second[2]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(1, ["step-12"]), (2, ["step-12", "step-8"]), (None, ["step-12", "step-4", "step-8"])],
)
def test_the_newest_are_kept_and_latest_names_the_last(tmp_path, keep, kept):
    store = checkpoints(tmp_path, keep=keep)

    newest = save(store, 4, 8, 12)

    assert names(store) == ["latest", *kept]
    assert (store.folder / "latest").read_text() == "step-12"
    assert store.newest_good() == newest


def test_a_stage_without_checkpoints_starts_at_the_beginning(tmp_path):
    assert checkpoints(tmp_path).newest_good() is None


def test_numbers_not_names_tell_which_is_newer(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 8, 12)
    (store.folder / "latest").unlink()

    assert store.newest_good() == store.folder / "step-12"


@pytest.mark.parametrize("pointer", [b"", b"step-99", b"\xff\xfe", b"../student", b"best"])
def test_a_pointer_that_names_no_checkpoint_is_passed_over(tmp_path, pointer):
    store = checkpoints(tmp_path)
    newest = save(store, 4, 8)
    (store.folder / "latest").write_bytes(pointer)
    (store.folder / "best").mkdir()
    (store.folder / "step-notes").mkdir()

    assert store.newest_good() == newest


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = [
    *((name, flip, f"the checksum of {name} differs") for name in FILES),
    *((name, cut, rf"{name} has \d+ bytes, \d+ were written") for name in FILES),
    *((name, Path.unlink, f"{name} is missing") for name in FILES),
    ("manifest.json", flip, "manifest.json cannot be read"),
    ("manifest.json", cut, None),
    ("manifest.json", Path.unlink, "manifest.json cannot be read"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path, caplog, name: str, damage: Callable[[Path], None], said: str | None
):
    store = checkpoints(tmp_path)
    newest = save(store, 4, 8)
    damage(newest / name)

    if said is None:  # only the newline at the end is gone
        assert store.newest_good() == newest
        return
    assert store.newest_good() == store.folder / "step-4"
    assert re.search(rf"{newest} is damaged \({said}", caplog.text)
    assert "using the one before it" in caplog.text


def test_no_bit_of_a_manifest_can_change_unseen(tmp_path):
    store = checkpoints(tmp_path)
    newest = save(store, 4, 8)
    path = newest / "manifest.json"
    content = path.read_bytes()

    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        damaged = store.damage(newest) is not None
        assert damaged or json.loads(changed) == json.loads(content)


def test_a_run_whose_checkpoints_are_all_damaged_starts_over_and_says_so(tmp_path, caplog):
    store = checkpoints(tmp_path)
    save(store, 4, 8)
    for folder in store.folder.glob("step-*"):
        flip(folder / SHARD)

    assert store.newest_good() is None
    assert caplog.text.count("is damaged") == 2


def test_a_checkpoint_of_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    save(checkpoints(tmp_path), 4)

    message = r"written with another config \(train.learning_rate: 0.1 there, 0.2 here\); use"
    with pytest.raises(CheckpointError, match=message):
        checkpoints(tmp_path, **{"train.learning_rate": 0.2}).newest_good()


def test_a_fingerprint_is_compared_as_the_file_can_hold_it(tmp_path):
    odd = {"sizes": (1, 2), "limit": float("inf"), "text": "é"}
    newest = save(checkpoints(tmp_path, **odd), 4)

    assert checkpoints(tmp_path, **odd).newest_good() == newest


def test_a_checkpoint_of_other_ranks_is_refused_with_both_numbers(tmp_path):
    newest = save(checkpoints(tmp_path), 4)
    four = Ranks(rank=0, world_size=4, local_rank=0, device=torch.device("cpu"))

    with pytest.raises(CheckpointError, match="written by 1 ranks and this run has 4; start it"):
        checkpoints(tmp_path, ranks=four)._check_origin(newest)


def test_a_checkpoint_that_was_named_is_used_by_its_stage_alone(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 4, 8)
    named = store.folder / "step-4"
    copied = tmp_path / "elsewhere"
    shutil.copytree(named, copied)

    assert store.given(named) == named
    assert store.given(copied) == copied
    other = Checkpoints(folder=tmp_path / "alone", fingerprint={}, keep=2, ranks=ALONE)
    assert other.given(named) is None


def test_a_named_checkpoint_that_is_damaged_or_none_is_an_error(tmp_path):
    store = checkpoints(tmp_path)
    named = save(store, 4)

    with pytest.raises(CheckpointError, match=r"student cannot be resumed from: manifest.json"):
        store.given(store.folder)
    flip(named / SHARD)
    with pytest.raises(CheckpointError, match="step-4 cannot be resumed from: the checksum of"):
        store.given(named)


def test_those_further_than_the_one_resumed_go_when_it_saves(tmp_path):
    store = checkpoints(tmp_path, keep=None)
    save(store, 4, 8, 12)

    save(store, 6)

    assert names(store) == ["latest", "step-4", "step-6"]
    assert store.newest_good() == store.folder / "step-6"


def test_an_old_one_that_cannot_be_removed_does_not_stop_the_run(tmp_path, caplog, monkeypatch):
    store = checkpoints(tmp_path, keep=1)
    save(store, 4)

    def busy(path: Path, **_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", busy)

    assert save(store, 8) == store.newest_good()
    assert "step-4 could not be removed" in caplog.text


class Killed(BaseException):
    """Stands for a SIGKILL: nothing that handles errors may see it."""


@contextmanager
def killed_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Ends the process at the n-th call that changes the disk, counted from 0."""
    calls = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if calls[0] == call:
                raise Killed
            calls[0] += 1
            return real(*arguments, **options)

        return wrapper

    with monkeypatch.context() as patch:
        for owner, name in (
            (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (os, "fsync"), (os, "unlink"),
            (os, "rmdir"), (torch, "save"),
        ):  # fmt: skip
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield calls


def test_killed_at_any_moment_of_a_save_the_run_goes_on_from_a_whole_one(tmp_path, monkeypatch):
    survived: list[str] = []
    for call in range(1000):
        store = checkpoints(tmp_path / str(call), keep=1)
        save(store, 4)
        flip(save_unlisted(store, 8) / SHARD)
        try:
            with killed_at(call, monkeypatch):
                save(store, 8)
        except Killed:
            good = store.newest_good()
            assert good is not None
            survived.append(good.name)
            state, _ = store.load(good, read_nothing)
            assert state == {"step": int(good.name.removeprefix("step-"))}
            assert save(store, 8) == store.newest_good()
            assert names(store) == ["latest", "step-8"]
        else:
            break

    assert survived == sorted(survived)
    assert set(survived) == {"step-4", "step-8"}


def save_unlisted(store: Checkpoints, step: int) -> Path:
    """A checkpoint that `latest` does not name yet."""
    latest = (store.folder / "latest").read_text()
    wide = Checkpoints(folder=store.folder, fingerprint=store.fingerprint, keep=None, ranks=ALONE)
    written = save(wide, step)
    write_text(store.folder / "latest", latest)
    return written


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def assert_nothing_destroyed(store: Checkpoints) -> None:
    assert names(store) == ["latest", "step-4"]
    assert store.newest_good() == store.folder / "step-4"


def refuses_for_lack_of_space(store: Checkpoints) -> Any:
    return pytest.raises(
        CheckpointError,
        match=rf"^the checkpoint of step 8 could not be written to {store.folder}: "
        r"(No space left on device|File too large); nothing else was changed, the last good one "
        rf"is {store.folder}/step-4; free some space and start the same command again$",
    )


def test_a_disk_that_fills_up_under_the_engine_destroys_nothing(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 4)

    with refuses_for_lack_of_space(store):
        store.save(8, full_disk, {}, {})

    assert_nothing_destroyed(store)


@pytest.mark.parametrize("owner", [os, checkpoint_module.Path])
def test_a_disk_that_fills_up_at_the_end_of_a_save_destroys_nothing(tmp_path, monkeypatch, owner):
    store = checkpoints(tmp_path)
    save(store, 4)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "fsync" if owner is os else "rename", full_disk)
        with refuses_for_lack_of_space(store):
            save(store, 8)

    assert_nothing_destroyed(store)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system's own refusal to write: EFBIG, as a full quota would be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_torch_that_cannot_write_gives_the_systems_own_reason(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 4)

    with largest_file(3000), refuses_for_lack_of_space(store):
        save(store, 8)

    assert_nothing_destroyed(store)
    with largest_file(3000), pytest.raises(OSError, match="File too large"):
        write_tensors(tmp_path / "x.pt", {"weight": torch.zeros(1000)})


def test_the_engines_files_wait_with_their_failure_until_all_ranks_can_hear(tmp_path):
    writer = CarefulWriter(None)

    with largest_file(3000):
        writer.save({"weight": torch.zeros(1000)}, str(tmp_path / "x.pt"))

    with pytest.raises(OSError, match="File too large"):
        writer.raise_failure()


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    store = checkpoints(tmp_path)
    save(store, 4)
    usage = shutil._ntuple_diskusage(10, 9, 1)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda _: usage)

    with refuses_for_lack_of_space(store):
        save(store, 8)

    assert_nothing_destroyed(store)


def test_another_failure_is_reported_as_what_it_is(tmp_path):
    store = checkpoints(tmp_path)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "shard.pt")

    with pytest.raises(CheckpointError, match=r"Permission denied.*there is none before it; start"):
        store.save(8, refused, {}, {})


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    store = checkpoints(tmp_path)
    save(store, 4)
    left = store.folder / "step-8.partial"
    left.mkdir()
    (left / SHARD).write_bytes(b"half")

    assert store.newest_good() == store.folder / "step-4"
    save(store, 12)

    assert names(store) == ["latest", "step-12", "step-4"]
