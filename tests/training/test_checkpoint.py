"""Checkpoints are whole or absent, checked before they are used, and never destroy one another."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checkpoint_store import (
    ALONE,
    FILES,
    SHARD,
    checkpoints,
    flip,
    load,
    names,
    read_nothing,
    save,
    states_of,
)

from megakd.engine.distributed import Ranks
from megakd.errors import CheckpointError
from megakd.process.seeding import random_state, seed_everything
from megakd.training import checkpoint as checkpoint_module
from megakd.training.checkpoint import Checkpoints, check_plain
from megakd.training.stage_batches import check_readers


@pytest.fixture
def store(tmp_path) -> Checkpoints:
    return checkpoints(tmp_path)


def draws() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002


def test_state_and_random_numbers_come_back_after_the_shards_are_read(store):
    seed_everything(3, rank=0)
    folder = save(store, 4)
    wanted = draws()

    def read_shards(folder: Path) -> None:
        assert (folder / SHARD).is_file()
        draws()

    assert load(store, folder, read_shards) == {"step": 4, "window": 40}
    assert draws() == wanted


def test_tensors_of_a_gpu_are_read_to_the_device_of_the_rank(store, monkeypatch):
    """The file may be read on a node where the rank has another GPU."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        values = {"average": torch.ones(3)}
        folder = save(store, 4, values=values)

    store.load(folder, read_nothing, states_of(values))

    assert values["average"].device.type == "cpu"


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


@pytest.mark.parametrize("pointer", [None, b"\xff\xfe", b"../student", b"best"])
def test_a_pointer_that_names_no_checkpoint_is_passed_over(store, pointer):
    assert store.newest_good() is None
    newest = save(store, 4, 8)
    (store.folder / "latest").unlink()
    if pointer is not None:
        (store.folder / "latest").write_bytes(pointer)
    (store.folder / "best").mkdir()
    (store.folder / "step-notes").mkdir()

    assert store.newest_good() == newest


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = [
    *((name, flip, f"the checksum of {name} differs") for name in FILES),
    (SHARD, cut, rf"{SHARD} has \d+ bytes, \d+ were written"),
    (SHARD, Path.unlink, f"{SHARD} is missing"),
    ("manifest.json", flip, "manifest.json cannot be read"),
    ("manifest.json", cut, None),
    ("manifest.json", Path.unlink, "manifest.json cannot be read"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    store, caplog, name: str, damage: Callable[[Path], None], reason: str | None
):
    newest = save(store, 4, 8)
    damage(newest / name)

    if reason is None:  # only the newline at the end is gone
        assert store.newest_good() == newest
        return
    assert store.newest_good() == store.folder / "step-4"
    assert (store.folder / "latest").read_text() == "step-4"
    told = rf"{newest} is damaged \({reason}.*renamed to {newest}.unused-1: using .*/step-4$"
    assert re.search(told, caplog.text, re.MULTILINE)


def test_the_manifest_names_what_was_written_even_if_a_listing_does_not_show_it(store, monkeypatch):
    with monkeypatch.context() as stale:
        stale.setattr(Path, "rglob", lambda *_: iter(()))
        stale.setattr(Path, "iterdir", lambda _: iter([store.folder / "step-4"]))
        newest = save(store, 4)

    flip(newest / SHARD)
    assert store.damage(newest) == f"the checksum of {SHARD} differs"
    assert json.loads((newest / "manifest.json").read_text())["files"].keys() == set(FILES)


def test_no_bit_of_a_manifest_can_change_unseen(store):
    newest = save(store, 4, 8)
    path = newest / "manifest.json"
    content = path.read_bytes()

    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        damaged = store.damage(newest) is not None
        assert damaged or json.loads(changed) == json.loads(content)


def test_a_run_whose_pointer_alone_is_visible_does_not_start_over(store, tmp_path):
    save(store, 4)
    (store.folder / "step-4").rename(tmp_path / "not visible")

    with pytest.raises(CheckpointError, match=r"step-4 is damaged .*No such file"):
        store.newest_good()


def test_a_checkpoint_that_was_not_there_at_the_start_is_not_removed(tmp_path, caplog):
    store = checkpoints(tmp_path, keep=1)
    save(store, 4)
    newest = save(checkpoints(tmp_path, keep=None), 8)
    newest.rename(tmp_path / "not visible")
    assert store.newest_good() == store.folder / "step-4"
    assert f"{newest} is damaged (manifest.json cannot be read" in caplog.text
    (tmp_path / "not visible").rename(newest)

    save(store, 6)

    assert names(store) == ["latest", "step-6", "step-8.unused-1"]


@pytest.mark.parametrize("step", [6, 8, 12])
def test_no_save_removes_a_checkpoint_that_the_run_has_passed_over(tmp_path, step):
    store = checkpoints(tmp_path, keep=1)
    save(store, 4)
    kept = checkpoints(tmp_path, keep=None)
    for damaged in (save(kept, 8), save(kept, 12)):
        (damaged / SHARD).rename(tmp_path / damaged.name)
    assert store.newest_good() == store.folder / "step-4"

    save(store, step)

    passed_over = ["step-12.unused-1", "step-8.unused-1"]
    assert names(store) == sorted(["latest", f"step-{step}", *passed_over])
    for name in passed_over:
        (tmp_path / name.removesuffix(".unused-1")).rename(store.folder / name / SHARD)
        assert store.damage(store.folder / name) is None


def test_a_checkpoint_of_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    save(checkpoints(tmp_path), 4)

    differing = r"\(train.learning_rate: 0.1 there, 0.2 here\)"
    message = rf"written with another config {differing}; use .* or remove {tmp_path}/student, and"
    with pytest.raises(CheckpointError, match=message):
        checkpoints(tmp_path, **{"train.learning_rate": 0.2}).newest_good()


def test_a_stage_that_may_not_resume_refuses_to_write_over_its_checkpoints(store):
    newest = save(store, 8)

    message = f"{newest} exists and resume_from_checkpoint is false; use another output_dir"
    with pytest.raises(CheckpointError, match=message):
        store.to_resume(wanted=False)


def test_a_fingerprint_is_compared_as_the_file_can_hold_it(tmp_path):
    odd = {"sizes": (1, 2), "limit": float("inf"), "text": "é"}
    newest = save(checkpoints(tmp_path, **odd), 4)

    assert checkpoints(tmp_path, **odd).newest_good() == newest


def test_other_ranks_read_a_checkpoint_and_keep_their_own_random_numbers(tmp_path):
    folder = save(checkpoints(tmp_path), 4)
    third = Ranks(rank=2, world_size=4, local_rank=2, device=torch.device("cpu"))
    seed_everything(5, rank=2)
    before = random_state()
    values: dict[str, Any] = {"step": None, "window": None}

    states = states_of(values)
    writers = checkpoints(tmp_path, ranks=third).load(folder, read_nothing, states)

    assert (writers, values) == (1, {"step": 4, "window": 40})
    assert torch.equal(random_state()["torch"], before["torch"])


@pytest.mark.parametrize(("readers", "fitting"), [(4, "1 or 2 or 4"), (2, "1 or 2")])
def test_a_stream_that_ranks_cannot_share_names_the_ranks_that_can(tmp_path, readers, fitting):
    batches = {"batches": {"step": 4, "readers": [{}] * readers}}
    folder = save(checkpoints(tmp_path), 4, values=batches)
    three = Ranks(rank=0, world_size=3, local_rank=0, device=torch.device("cpu"))

    message = (
        f"{readers} readers of a stream, which 3 ranks cannot share evenly; .* {fitting} ranks"
    )
    with pytest.raises(CheckpointError, match=message):
        check_readers(folder, three)
    check_readers(folder, ALONE)


def test_a_checkpoint_that_was_named_is_used_by_its_stage_alone(store, tmp_path):
    save(store, 4, 8)
    named = store.folder / "step-4"
    copied = tmp_path / "elsewhere"
    shutil.copytree(named, copied)

    assert store.given(named) == named
    assert store.given(copied) == copied
    other = Checkpoints(folder=tmp_path / "alone", fingerprint={}, keep=2, ranks=ALONE)
    assert other.given(named) is None
    shutil.rmtree(named)
    assert other.to_resume(str(named)) is None


def test_a_named_checkpoint_is_begun_from_once_and_then_the_stages_own_are(store, tmp_path):
    save(store, 4, 8)
    given = store.folder / "step-4"
    other = checkpoints(tmp_path / "other")
    save(other, 2)

    assert other.to_resume(str(given)) == given
    other.begin_from(given)
    assert names(other) == ["begun_from", "step-2.unused-1"]
    assert other.to_resume(str(given)) == given  # killed before its first save
    newest = save(other, 6)
    assert other.to_resume(str(given)) == newest
    shutil.rmtree(given)
    assert other.to_resume(str(given)) == newest
    assert other.to_resume(str(store.folder / "step-8")) == store.folder / "step-8"


def test_a_stage_that_returns_to_an_earlier_checkpoint_does_not_go_on_from_a_later_one(tmp_path):
    store = checkpoints(tmp_path, keep=None)
    save(store, 4, 8, 12)
    given = str(store.folder / "step-4")

    store.begin_from(Path(given))

    kept = ["begun_from", "latest", "step-12.unused-1", "step-4", "step-8.unused-1"]
    assert names(store) == kept
    assert store.to_resume(given) == store.newest_good() == store.folder / "step-4"
    assert save(store, 6) == store.to_resume(given)


@pytest.mark.parametrize("name", ["step-4-kept", "step-4.unused-1"])
def test_a_copy_beside_the_checkpoints_is_begun_from_as_one_of_another_run(tmp_path, name):
    store = checkpoints(tmp_path, keep=None)
    save(store, 4, 8)
    given = Path(shutil.copytree(store.folder / "step-4", store.folder / name))

    store.begin_from(given)

    assert {path.name for path in store.folder.glob("step-*") if path.suffix == ""} <= {name}
    assert store.to_resume(str(given)) == given
    assert save(store, 6) == store.to_resume(str(given))


def test_a_stage_that_has_saved_nothing_since_misses_its_named_checkpoint(store, tmp_path):
    save(store, 4)
    given = Path(shutil.copytree(store.folder / "step-4", tmp_path / "backup" / "step-4"))
    other = checkpoints(tmp_path / "other")
    other.begin_from(given)
    shutil.rmtree(given)

    with pytest.raises(CheckpointError, match=r"backup/step-4 cannot be resumed from: manifest"):
        other.to_resume(str(given))


def test_a_link_to_a_checkpoint_is_one_of_the_stage(tmp_path):
    store = checkpoints(tmp_path, keep=None)
    save(store, 4, 8)
    link = store.folder / "step-4"
    link.rename(tmp_path / "kept")
    link.symlink_to(tmp_path / "kept")

    store.begin_from(link)

    assert names(store) == ["begun_from", "latest", "step-4", "step-8.unused-1"]
    assert store.to_resume(str(link)) == link


def test_a_named_checkpoint_that_is_damaged_or_none_is_an_error(store):
    named = save(store, 4)

    with pytest.raises(CheckpointError, match=r"student cannot be resumed from: manifest.json"):
        store.given(store.folder)
    flip(named / SHARD)
    with pytest.raises(CheckpointError, match="step-4 cannot be resumed from: the checksum of"):
        store.given(named)


def test_an_old_one_that_cannot_be_removed_does_not_stop_the_run(tmp_path, caplog, monkeypatch):
    store = checkpoints(tmp_path, keep=1)
    save(store, 4)

    def busy(path: Path, **_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", busy)

    assert save(store, 8) == store.newest_good()
    assert "step-4 could not be removed" in caplog.text


class Counted(NamedTuple):
    """A class that a later version may have moved."""

    value: int


@pytest.mark.parametrize(
    "value",
    [np.float64(1.0), {"inner": [Counted(3)]}, {Counted(3): 1}, deque([1])],
    ids=["numpy number", "nested", "name", "deque"],
)
def test_an_object_of_a_class_is_refused_before_it_gets_into_a_checkpoint(tmp_path, value):
    with pytest.raises(TypeError, match="plain values"):
        check_plain({"strategy": value})


def test_a_checkpoint_of_another_version_is_refused_in_one_line(store, monkeypatch):
    saved = save(store, 3)
    torch.save({"strategy": Counted(3)}, saved / "state.pt")
    with monkeypatch.context() as earlier:
        earlier.setattr("megakd.training.checkpoint.FORMAT", 1)
        save(store, 4)

    message = rf"^{store.folder}.*another version of megakd.*$"
    for read in (lambda: load(store, saved), store.newest_good):
        with pytest.raises(CheckpointError, match=message) as refused:
            read()
        assert "\n" not in str(refused.value)
