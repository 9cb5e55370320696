"""A frozen model's answers, without an engine around it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megakd.contract.batch import Batch, Knowledge, Predictions
from megakd.models.knowledge import Needs
from megakd.teachers.frozen import FrozenModel


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

    assert isinstance(taught, Knowledge)
    assert isinstance(scored, Predictions)
    assert taught.logits.tolist() == scored.outputs.tolist() == expected
    assert module.state_dict() == {}
