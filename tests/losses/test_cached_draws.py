"""The soft targets of cached draws: the shares of the drawn tokens, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from source_scene import LENGTH, ROWS, VOCABULARY, Texts, head_of, objective_of, result

from megakd.contract.batch import IGNORE, Draws, Knowledge, LossInputs, TopK
from megakd.contract.terms import SoftTargetKl
from megakd.losses.bundle import unit_scales
from megakd.losses.targets import AGREEMENT

KL = SoftTargetKl(loss="soft_target_kl")
DRAWN = 4


def drawn_shares() -> torch.Tensor:
    """Shares of four draws at every position, [B, T, V]; each is of one or two tokens."""
    made = torch.Generator().manual_seed(5)
    first, second = torch.randint(VOCABULARY, (2, ROWS, LENGTH), generator=made)
    hot = [torch.nn.functional.one_hot(ids, VOCABULARY) for ids in (first, second)]
    return (3 * hot[0] + hot[1]) / DRAWN


def draws_of(shares: torch.Tensor) -> Draws:
    best, ids = shares.topk(DRAWN, dim=-1)
    return Draws(ids.masked_fill(best == 0, -1).int(), best.log())


def test_the_loss_is_the_divergence_from_the_shares_of_the_draws():
    texts, shares = Texts(), drawn_shares()
    counted = texts.labels != IGNORE
    hidden, head = (t.clone().requires_grad_() for t in (texts.hidden, texts.head))

    actual = result(texts, (KL,), taught=Knowledge(kept=draws_of(shares)))

    log_q = (hidden @ head.T).log_softmax(-1)
    rows = (torch.xlogy(shares, shares) - shares * log_q).sum(-1)[counted]
    torch.testing.assert_close(actual.sums["soft_target_kl"], rows.sum().detach())
    gradients = torch.autograd.grad(rows.mean(), (hidden, head))
    for gradient, expected in zip(actual.gradients.values(), gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    agree = log_q.argmax(-1) == shares.argmax(-1)
    assert actual.sums[AGREEMENT] == agree[counted].sum()


def test_draws_are_limited_to_a_source_like_all_targets():
    texts, alone = Texts(), Texts()
    alone.labels = texts.labels.masked_fill(~texts.of("data"), IGNORE)
    taught = Knowledge(kept=draws_of(drawn_shares()))

    actual = result(texts, (replace(KL, on="data"),), taught=taught)

    expected = result(alone, (KL,), taught=taught)
    torch.testing.assert_close(actual.total, expected.total)
    torch.testing.assert_close(actual.gradients, expected.gradients)


def test_readings_of_several_views_learn_from_the_same_draws():
    texts, objective = Texts(), objective_of((KL,))
    taught = Knowledge(kept=draws_of(drawn_shares()))

    def reading(factor: float, scale: float) -> LossInputs:
        student: Any = Knowledge(hidden=texts.hidden * factor, head=head_of(texts.head))
        counts = unit_scales(texts.counts(objective), 1).weights
        return LossInputs(student, taught, texts.batch(), objective.weights, counts, scale=scale)

    readings = [reading(1.0, 0.5), reading(0.3, 0.25)]
    together, alone = objective(readings), [objective([one])[0] for one in readings]

    totals = [torch.stack([one.total for one in each]).sum() for each in (together, alone)]
    torch.testing.assert_close(*totals)


@pytest.mark.parametrize("kind", [Draws, TopK])
def test_tokens_that_only_the_teachers_table_has_are_left_to_the_rest(kind):
    texts, draws = Texts(), draws_of(drawn_shares())
    missing = draws.ids == draws.ids.amax(-1, keepdim=True)
    kept = kind(draws.ids, draws.logprobs - 1)
    padded = kind(draws.ids.masked_fill(missing, VOCABULARY + 3), kept.logprobs)

    actual, expected = (
        result(texts, (KL,), taught=Knowledge(kept=one))
        for one in (padded, kind(draws.ids.masked_fill(missing, -1), kept.logprobs))
    )

    torch.testing.assert_close(actual.total, expected.total)
    assert actual.total.isfinite()
    torch.testing.assert_close(actual.gradients, expected.gradients)
