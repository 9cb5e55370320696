"""Served teachers: every document is asked for by itself, and answers land at its positions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data.batch import IGNORE, Batch, TopK
from megakd.engine import collectives
from megakd.errors import ServerError
from megakd.teachers.servers import BestTokens
from megakd.training.served_teachers import ServedTeacher

RANKS: Any = SimpleNamespace(rank=0, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda: 1)


class Sums:
    """A server whose best token is the sum of the tokens so far."""

    url = "http://sums"

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def top_k(self, ids: tuple[int, ...], count: int, model: str) -> BestTokens:
        assert model == "m"
        self.asked.append(ids)
        sums = [sum(ids[: place + 1]) for place in range(len(ids) - 1)]
        ids = np.array([(total, *range(1, count)) for total in sums], dtype=np.int32)
        return BestTokens(ids, np.full(ids.shape, -0.5, dtype=np.float32))


def teacher(*servers: Any, vocabulary: int = 10**6) -> ServedTeacher:
    names = ["m"] * len(servers)
    return ServedTeacher(servers, names, top_k=2, vocabulary=vocabulary, ranks=RANKS)


def batch_of(rows: list[list[int]], lengths: list[list[int]]) -> Batch:
    """Rows of documents with these lengths, padded on the right, without labels."""
    width = max([1, *map(len, rows)])
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    valid, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (tokens, counts) in enumerate(zip(rows, lengths, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        valid[row, : len(tokens)] = 1
        places = [place for count in counts for place in range(count)]
        positions[row, : len(places)] = torch.tensor(places, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    return Batch({"input_ids": ids, "position_ids": positions}, labels, valid.bool())


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4))
def test_answers_are_those_of_each_document_alone(lengths):
    rows = [[7 * number + place for place in range(sum(c))] for number, c in enumerate(lengths)]
    first, second = Sums(), Sums()

    kept = teacher(first, second)(batch_of(rows, lengths)).kept

    assert isinstance(kept, TopK)
    wanted = torch.full(kept.ids.shape[:2], -1)
    for number, counts in enumerate(lengths):
        start = 0
        for count in counts:
            for place in range(start, start + count - 1):
                wanted[number, place] = sum(rows[number][start : place + 1])
            start += count
    assert torch.equal(kept.ids[..., 0].long(), wanted)
    assert torch.equal(kept.logprobs == 0, kept.ids < 0)
    asked = len(first.asked) + len(second.asked)
    assert asked == sum(count > 1 for counts in lengths for count in counts)
    assert abs(len(first.asked) - len(second.asked)) <= 1


def test_a_document_that_goes_on_in_the_next_row_predicts_its_first_token():
    batch, server = batch_of([[1, 2, 3], [9]], [[2, 1], [1]]), Sums()
    batch.labels[0, 2] = 6
    batch.labels[1, 0] = 4

    kept = teacher(server)(batch).kept

    assert sorted(server.asked) == [(1, 2), (3, 6), (9, 4)]
    assert isinstance(kept, TopK)
    assert kept.ids[..., 0].tolist() == [[1, -1, 3], [9, -1, -1]]


def test_the_micro_batches_of_a_step_get_their_own_answers():
    batches = [batch_of([[1, 2, 3]], [[3]]), batch_of([[5, 6]], [[2]]), batch_of([[]], [[]])]

    kept = [answer.kept for answer in teacher(Sums()).answers(batches)]

    tops = [None if one is None else one.ids[0, :, 0].tolist() for one in kept]
    assert tops == [[1, 3, -1], [5, -1], [-1]]


def test_a_token_that_the_teacher_does_not_have_is_refused():
    message = r"http://sums knows token 9, and teacher and student share 8"
    with pytest.raises(ServerError, match=message):
        teacher(Sums(), vocabulary=8)(batch_of([[4, 5, 1]], [[3]]))
