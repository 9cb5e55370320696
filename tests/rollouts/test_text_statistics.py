"""Entropy and divergence of next-token distributions, summed in groups of positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_scene import Matrix
from torch import Tensor

from megakd.contract.batch import Batch, Knowledge, LossInputs
from megakd.rollouts.text_evaluation import sums_by_group

ROWS, LENGTH, WIDTH, VOCABULARY = 2, 5, 4, 7


def answer_of(seed: int, tokens: int = VOCABULARY) -> Any:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, LENGTH, WIDTH, generator=generator)
    head: Any = Matrix(torch.randn(tokens, WIDTH, generator=generator))
    return Knowledge(hidden=hidden, head=head)


def reading(student: Knowledge, teacher: Knowledge | None, **parts: Any) -> LossInputs:
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    batch = Batch({"input_ids": ids}, ids, ids.bool(), **parts)
    return LossInputs(student=student, teacher=teacher, batch=batch, weights={}, per_unit={})


def logprobs(one: Any, shared: int = VOCABULARY) -> Tensor:
    """[B, T, shared] in fp64."""
    product = one.hidden.double() @ one.head.weight.double().T
    return product[..., :shared].log_softmax(-1)


def entropy(logs: Tensor) -> Tensor:
    return -(logs.exp() * logs).sum(-1)


GROUPS = torch.tensor([[-1, 0, 0, 2, -1], [0, 2, 2, 2, -1]])


def test_every_group_sums_its_positions_and_no_others() -> None:
    student, teacher = answer_of(0), answer_of(1)

    actual = sums_by_group(reading(student, teacher), GROUPS, 3)

    p, q = logprobs(teacher), logprobs(student)
    kl = (p.exp() * (p - q)).sum(-1)
    for number in range(3):
        mine = number == GROUPS
        columns = (mine.double(), entropy(q) * mine, kl * mine, entropy(p) * mine)
        wanted = torch.stack([column.sum() for column in columns])
        torch.testing.assert_close(actual[number], wanted, rtol=1e-5, atol=1e-5)
    assert actual[1].tolist() == [0, 0, 0, 0]


def test_positions_that_do_not_count_may_hold_anything() -> None:
    student, teacher = answer_of(0), answer_of(1)
    wanted = sums_by_group(reading(student, teacher), GROUPS, 3)
    for one in (student, teacher):
        one.hidden[GROUPS < 0] = torch.nan

    assert torch.equal(sums_by_group(reading(student, teacher), GROUPS, 3), wanted)


def test_the_divergence_runs_over_the_tokens_that_both_models_have() -> None:
    student, teacher = answer_of(0), answer_of(1, tokens=VOCABULARY - 2)

    actual = sums_by_group(reading(student, teacher), GROUPS, 3)

    p, q = (logprobs(one, VOCABULARY - 2) for one in (teacher, student))
    wanted = ((p.exp() * (p - q)).sum(-1) * (GROUPS == 2)).sum()
    torch.testing.assert_close(actual[2, 2], wanted, rtol=1e-5, atol=1e-5)


def test_outputs_at_chosen_positions_are_found_by_their_positions() -> None:
    """A model may have predicted some positions alone."""
    student, teacher = answer_of(0), answer_of(1)
    wanted = sums_by_group(reading(student, teacher), GROUPS, 3)
    targets = (GROUPS.flatten() >= 0).nonzero().squeeze(1)
    chosen = [one._replace(hidden=one.hidden.flatten(0, 1)[targets]) for one in (student, teacher)]

    actual = sums_by_group(reading(*chosen, targets=targets), GROUPS, 3)

    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("teacher", [None, Knowledge()], ids=["none", "without hidden states"])
def test_without_a_distribution_of_a_teacher_only_the_student_has_an_entropy(teacher) -> None:
    result = sums_by_group(reading(answer_of(0), teacher), GROUPS, 3)

    assert result[:, 2:].isnan().all()
    assert result[[0, 2], 1].min() > 0
