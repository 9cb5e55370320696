"""A watch on teachers' answers that are not finite."""

from __future__ import annotations

import pytest
import torch

from megakd.contract.batch import Batch, Knowledge
from megakd.training.trainer import AnswerWatch

CPU = torch.device("cpu")
VALID = torch.tensor([[True, False], [True, True], [False, False]])


def failed(*answers: Knowledge, targets: torch.Tensor | None = None) -> list[str]:
    watch = AnswerWatch()
    for answer in answers:
        batch = Batch({}, torch.zeros(3, dtype=torch.long), VALID, targets)
        watch.add({"calm": Knowledge(logits=torch.zeros(3, 2)), "seen": answer}, batch)
    return watch.failed(CPU)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_teacher_with_an_answer_that_is_not_finite_is_named(bad):
    logits, hidden = torch.zeros(3, 2), torch.zeros(3, 2, 4)
    logits[1, 0] = hidden[1, 1, 2] = bad

    assert failed(Knowledge(logits=logits)) == ["seen"]
    assert failed(Knowledge(hidden=hidden)) == ["seen"]
    assert failed(Knowledge(hidden=hidden[1]), targets=torch.tensor([2, 3])) == ["seen"]


def test_what_padding_and_empty_rows_say_does_not_count():
    logits, hidden = torch.zeros(3, 2), torch.zeros(3, 2, 4)
    logits[2], hidden[0, 1], hidden[2] = torch.nan, torch.nan, torch.nan

    assert failed(Knowledge(logits=logits)) == []
    assert failed(Knowledge(hidden=hidden)) == []
    assert failed(Knowledge()) == []


def test_one_bad_answer_is_not_forgotten():
    bad, good = torch.full((3, 2), torch.nan), torch.zeros(3, 2)

    assert failed(Knowledge(logits=bad), Knowledge(logits=good)) == ["seen"]


def test_a_run_without_teachers_has_none_that_failed():
    assert AnswerWatch().failed(CPU) == []
