"""Answers of frozen teachers: in the order of the data, and kept on disk whole and checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_store import flip
from datasets import Dataset
from torch import Tensor, nn

from megakd.data.batch import Batch, Draws, Outputs, Predictions
from megakd.engine import distributed
from megakd.engine.distributed import Ranks
from megakd.errors import TeacherError
from megakd.models.outputs import Needs
from megakd.teachers import cached
from megakd.teachers.cached import CachedTeacher, missing_rows, write_shard
from megakd.teachers.frozen import FrozenModel

ONE_RANK = Ranks(0, 1, 0, torch.device("cpu"))
ROWS, CLASSES, PER_SHARD = 23, 3, 5
FACTS = {"data": "these", "teacher.weights": "those"}
Answering = Callable[[Dataset, int], dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    """One rank without a process group, and small shards."""
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(cached, "SHARD_ROWS", PER_SHARD)


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_dict({"number": list(range(ROWS))})


class Teacher:
    """Says of row n: n, n + 1/2, n squared."""

    def __init__(self, most: int = ROWS) -> None:
        self.asked: list[int] = []
        self.most = most

    def __call__(self, part: Dataset, first: int) -> dict[str, torch.Tensor]:
        assert first == part["number"][0]
        numbers = torch.tensor(part["number"], dtype=torch.float32)
        if len(self.asked) + len(numbers) > self.most:
            raise KeyboardInterrupt
        self.asked += part["number"]
        return {"logits": torch.stack([numbers, numbers + 0.5, numbers**2], dim=1)}


def build(folder: Path, rows: Dataset, teacher: Answering, facts=FACTS) -> Path:
    size = 4 * CLASSES
    for numbers in missing_rows(folder, facts, len(rows), ranks=ONE_RANK, row_bytes=size):
        write_shard(folder, numbers.start, teacher(rows.select(numbers), numbers.start))
    return folder


@pytest.fixture
def kept(tmp_path, rows) -> Path:
    return build(tmp_path / "cache", rows, Teacher())


def read(folder: Path, facts=FACTS) -> CachedTeacher:
    return CachedTeacher(folder, facts, ONE_RANK)


def batch(numbers: list[int], length: int = 4) -> Batch:
    valid = torch.ones(len(numbers), length, dtype=torch.bool)
    return Batch({}, torch.zeros(len(numbers)), valid, rows=torch.tensor(numbers))


def test_every_row_gets_its_own_answer_whatever_the_order(kept):
    order = torch.randperm(ROWS).tolist()

    answer = read(kept)(batch([*order, -1])).logits

    expected = torch.tensor([[n, n + 0.5, n**2] for n in order])
    torch.testing.assert_close(answer[:-1], expected, rtol=0, atol=0)
    assert answer[-1].tolist() == [0, 0, 0]  # a row that keeps the ranks in step


def test_draws_are_read_as_the_shares_of_their_tokens(tmp_path, rows):
    ids = torch.tensor([[[3, 8, -1, -1], [-1] * 4, [-1] * 4]], dtype=torch.int32)
    counts = torch.tensor([[[1, 3, 0, 0], [0] * 4, [0] * 4]], dtype=torch.uint8)

    def say(part: Dataset, _: int) -> dict[str, torch.Tensor]:
        return {"ids": ids.repeat(len(part), 1, 1), "counts": counts.repeat(len(part), 1, 1)}

    folder = build(tmp_path / "cache", rows, say)
    kept = read(folder)(batch([4, -1], length=2)).kept

    assert isinstance(kept, Draws)
    assert kept.ids[0].tolist() == [[3, 8, -1, -1], [-1] * 4]
    nothing = -math.inf
    expected = [[math.log(0.25), math.log(0.75), nothing, nothing], [nothing] * 4]
    torch.testing.assert_close(kept.logprobs[0], torch.tensor(expected))
    assert kept.ids[1].tolist() == [[0] * 4] * 2  # a dummy row
    assert (kept.logprobs[1] == nothing).all()


def test_a_start_that_was_killed_is_gone_on_with_and_no_row_is_asked_twice(tmp_path, rows, caplog):
    caplog.set_level("INFO")
    first, second, idle = Teacher(most=12), Teacher(), Teacher()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", rows, first)
    with pytest.raises(TeacherError, match="10 of 23 rows; complete the cache: megakd cache"):
        read(tmp_path / "cache")
    started = "23 rows of 12 bytes, 0.0 MB in 5 shards; 0 rows are already cached"
    assert started in caplog.messages[0]
    half = tmp_path / "cache" / "0000000010"
    half.mkdir()
    (half / "logits.npy").write_bytes(b"half")

    folder = build(tmp_path / "cache", rows, second)
    build(folder, rows, idle)

    assert first.asked + second.asked == list(range(ROWS))
    assert idle.asked == []
    answer = read(folder)(batch([0, 11, 22])).logits
    assert answer[:, 0].tolist() == [0, 11, 22]


def test_answers_to_something_else_are_refused_naming_what_differs(kept, rows):
    other = {**FACTS, "data": "others"}

    for action in (lambda: read(kept, other), lambda: build(kept, rows, Teacher(), facts=other)):
        with pytest.raises(TeacherError, match="data: 'these' there, 'others' here"):
            action()


@pytest.mark.parametrize("content", [None, "{", "[]", "edited"])
def test_a_folder_without_its_list_is_refused_with_what_to_remove(kept, rows, content):
    listing = kept / "cache.json"
    text = listing.read_text().replace('"rows": 23', '"rows": 24')
    listing.unlink()
    if content is not None:
        listing.write_text(text if content == "edited" else content)

    damaged = f"{listing} is damaged or of an earlier version .*; remove {kept}"
    message = damaged if content else "does not exist; create the cache first"
    with pytest.raises(TeacherError, match=message):
        read(kept)
    if content:
        with pytest.raises(TeacherError, match=message):
            build(kept, rows, Teacher())


@pytest.mark.parametrize("name", ["0000000005", "0000000020"])
def test_a_damaged_shard_is_named_and_asked_again_and_no_other_row(kept, rows, name, caplog):
    file, again = kept / name / "logits.npy", Teacher()
    whole = file.read_bytes()
    flip(file)
    with pytest.raises(TeacherError, match=rf"{name} is damaged: .*logits\.npy"):
        read(kept)

    build(kept, rows, again)

    assert again.asked == list(range(ROWS))[int(name) : int(name) + PER_SHARD]
    assert f"{kept / name} is damaged (the checksum of logits.npy differs)" in caplog.text
    assert file.read_bytes() == whole
    answer = read(kept)(batch(list(range(ROWS)))).logits
    assert answer[:, 0].tolist() == list(range(ROWS))
    file.unlink()
    with pytest.raises(TeacherError, match=rf"{name} is damaged: .*logits\.npy"):
        read(kept)


class Echo(nn.Module):
    """Says the logits it is given."""

    config = SimpleNamespace(type_vocab_size=2)

    def forward(self, logits: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("order", "expected"),
    [(None, [[1, 2, 3], [6, 5, 4]]), ((2, 0, 1), [[3, 1, 2], [4, 6, 5]])],
    ids=["same order", "another order"],
)
def test_a_teachers_classes_are_put_into_the_order_of_the_data(order, expected):
    module = FrozenModel(Echo(), needs=Needs(), label_order=order)
    logits = torch.tensor([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]])
    batch = Batch({"logits": logits}, torch.tensor([0, 1]), torch.ones(2, 1, dtype=torch.bool))

    taught, scored = module(batch), module(batch, scoring=True)

    assert isinstance(taught, Outputs)
    assert isinstance(scored, Predictions)
    assert taught.logits.tolist() == scored.outputs.tolist() == expected
    assert module.state_dict() == {}
