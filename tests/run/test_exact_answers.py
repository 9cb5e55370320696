"""What 8 bits change of a teacher is logged over the tokens that count for the losses."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from lab_scene import ONE_RANK, pretend_one_rank
from tiny_families import build, small_configs

from megakd.data.batch import IGNORE, Batch, Outputs
from megakd.models.outputs import LanguageModelHead
from megakd.run.teacher_pool import log_divergence, log_probabilities

# The first row has a prompt of two tokens, the second one padding.
LABELS = torch.tensor([[IGNORE, 7, 8, IGNORE], [4, 5, IGNORE, IGNORE]])
HIDDEN = torch.arange(LABELS.numel() * 64).sin().reshape(*LABELS.shape, 64)
COUNTED = LABELS != IGNORE
ROWS = Dataset.from_dict({"row": [0, 1]})


def logged(caplog: Any, hidden: torch.Tensor, targets: torch.Tensor | None) -> str:
    """What is said of a teacher with these last hidden states, and `HIDDEN` in bf16."""
    batch = Batch({}, LABELS, torch.ones_like(COUNTED), targets)
    scorer: Any = SimpleNamespace(batch_size=2, ranks=ONE_RANK, batches=lambda _: [batch])
    head = LanguageModelHead(build(next(small_configs("llama", "causal_lm")), "causal_lm"))

    def answers(states: torch.Tensor) -> torch.Tensor:
        read = states if targets is None else states.flatten(0, 1)[targets]
        teacher: Any = lambda _: Outputs(hidden=read, head=head)  # noqa: E731
        return log_probabilities(scorer, ROWS, teacher)

    with caplog.at_level(logging.INFO, "megakd"):
        log_divergence("teacher", answers(HIDDEN), answers(hidden))
    return caplog.messages[-1]


# All positions, the labelled ones, and one more, which a batch without labels has.
@pytest.mark.parametrize("targets", [None, [1, 2, 4, 5], [1, 2, 4, 5, 7]])
def test_prompts_and_padding_do_not_change_the_divergence(monkeypatch, caplog, targets):
    pretend_one_rank(monkeypatch)
    positions = None if targets is None else torch.tensor(targets)

    elsewhere = logged(caplog, torch.where(COUNTED[..., None], HIDDEN, -9.0), positions)
    counted = logged(caplog, torch.where(COUNTED[..., None], -HIDDEN, HIDDEN), positions)

    same = "KL divergence from bf16 0.0000 nats, same most likely answer 100.0 %, on 4 held-out"
    assert same in elsewhere
    assert "on 4 held-out" in counted
    assert " 0.0000 nats" not in counted
