"""A teacher's answers are watched without waiting for them."""

from __future__ import annotations

import pytest
import torch

from megakd.contract.batch import Batch, Knowledge
from megakd.teachers.watched import WatchedTeacher

VALID = torch.tensor([[True, False], [True, True], [False, False]])


def failed(read: Knowledge, targets: torch.Tensor | None = None) -> bool:
    teacher = WatchedTeacher(lambda batch: read)  # type: ignore[arg-type]
    batch = Batch({}, torch.zeros(3, dtype=torch.long), VALID, targets)

    assert teacher(batch) is read
    return bool(teacher.failed)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_answer_that_is_not_finite_is_noted(bad):
    logits, hidden = torch.zeros(3, 2), torch.zeros(3, 2, 4)
    logits[1, 0] = hidden[1, 1, 2] = bad

    assert failed(Knowledge(logits=logits))
    assert failed(Knowledge(hidden=hidden))
    assert failed(Knowledge(hidden=hidden[1]), targets=torch.tensor([2, 3]))


def test_what_padding_and_empty_rows_say_does_not_count():
    logits, hidden = torch.zeros(3, 2), torch.zeros(3, 2, 4)
    logits[2], hidden[0, 1], hidden[2] = torch.nan, torch.nan, torch.nan

    assert not failed(Knowledge(logits=logits))
    assert not failed(Knowledge(hidden=hidden))
    assert not failed(Knowledge())


def test_one_bad_answer_is_not_forgotten():
    answers = [torch.full((3, 2), torch.nan), torch.zeros(3, 2)]
    teacher = WatchedTeacher(lambda batch: Knowledge(logits=answers.pop(0)))  # type: ignore[arg-type]
    batch = Batch({}, torch.zeros(3, dtype=torch.long), VALID)

    teacher(batch)
    teacher(batch)

    assert bool(teacher.failed)
