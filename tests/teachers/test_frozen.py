"""A frozen model's answers, without an engine around it, and a watch on them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from megakd.contract.batch import Batch, Knowledge, Predictions
from megakd.models.knowledge import Needs
from megakd.teachers.frozen import FrozenModel
from megakd.teachers.watched import WatchedTeacher

LOGITS = torch.tensor([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]])
BATCH = Batch({"logits": LOGITS}, torch.tensor([0, 1]), torch.ones(2, 1, dtype=torch.bool))


class Echo(nn.Module):
    """Says the logits it is given."""

    config = SimpleNamespace(type_vocab_size=2)

    def forward(self, logits: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=logits)


def frozen(order: tuple[int, ...] | None) -> FrozenModel:
    return FrozenModel(Echo(), needs=Needs(), label_order=order)


@pytest.mark.parametrize(
    ("order", "expected"),
    [(None, [[1, 2, 3], [6, 5, 4]]), ((2, 0, 1), [[3, 1, 2], [4, 6, 5]])],
    ids=["same order", "another order"],
)
def test_a_teachers_classes_are_put_into_the_order_of_the_data(order, expected):
    module = frozen(order)

    taught, scored = module(BATCH), module(BATCH, scoring=True)

    assert isinstance(taught, Knowledge)
    assert isinstance(scored, Predictions)
    assert taught.logits.tolist() == scored.outputs.tolist() == expected
    assert module.state_dict() == {}


def test_a_causal_lms_answer_leaves_its_head_to_the_engine():
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    module = FrozenModel(LlamaForCausalLM(config), needs=Needs(), label_order=None)
    ids = torch.tensor([[5, 6, 7]])
    batch = Batch({"input_ids": ids}, ids, torch.ones(1, 3, dtype=torch.bool))

    taught, scored = module(batch), module(batch, scoring=True)

    assert (taught.logits, taught.head) == (None, None)
    assert list(taught.hidden.shape) == [1, 3, 8]
    assert scored.outputs is None
    assert scored.sums[2] == 3


VALID = torch.tensor([[True, False], [True, True], [False, False]])


def failed(read: Knowledge, targets: torch.Tensor | None = None) -> bool:
    teacher = WatchedTeacher(lambda batch: read)
    batch = Batch({}, torch.zeros(3, dtype=torch.long), VALID, targets)

    assert teacher(batch) is read
    return teacher.has_failed


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
    teacher = WatchedTeacher(lambda batch: Knowledge(logits=answers.pop(0)))
    batch = Batch({}, torch.zeros(3, dtype=torch.long), VALID)

    teacher(batch)
    teacher(batch)

    assert teacher.has_failed
