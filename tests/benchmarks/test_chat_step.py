"""The bare loop on conversations: padding and questions count for nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import causal_step_bare
import kept_layers
from causal_step_case import QUICK
from chat_step import ChatBare


def batch_of(ids: torch.Tensor, labels: torch.Tensor, *, padding: int = 0) -> SimpleNamespace:
    mask = torch.ones_like(ids)
    if padding:
        ids, mask = (torch.nn.functional.pad(tensor, (0, padding)) for tensor in (ids, mask))
        labels = torch.nn.functional.pad(labels, (0, padding), value=-100)
    return SimpleNamespace(inputs={"input_ids": ids, "attention_mask": mask}, labels=labels)


def test_the_loss_is_the_mean_over_the_tokens_that_count():
    models, (ids,) = causal_step_bare.random_models(QUICK), causal_step_bare.random_ids(QUICK, 1)
    labels = torch.full_like(ids, -100)
    labels[:, 2:5] = ids[:, 3:6]
    batches = [batch_of(ids, labels), batch_of(ids, labels, padding=3)]
    bare = ChatBare(models, batches, causal_step_bare.forward_kl)

    with torch.no_grad():
        logits, soft = (one(input_ids=ids).logits[:, 2:5] for one in models)
    expected = causal_step_bare.forward_kl(logits, soft) / (3 * len(ids))
    assert bare.loss(0) == pytest.approx(float(expected), rel=1e-5)
    assert bare.loss(1) == pytest.approx(float(expected), rel=1e-5)


def test_the_rule_before_drops_the_first_layer_and_spacing_keeps_it():
    assert kept_layers.of_old(30, 20)[:2] == (2, 3)
    assert kept_layers.evenly(30, 20)[0] == 1
    assert kept_layers.evenly(30, 20)[-1] == 30
