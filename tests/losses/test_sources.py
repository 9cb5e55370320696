"""Terms of rollouts or of data, and soft targets of cached draws: their sums and divisors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_scene import VOCABULARIES, Matrix, Scene, term_of

from megakd.data.batch import IGNORE, Draws, Outputs, Targets, TopK
from megakd.losses.targets import AGREEMENT

CE = term_of("hard_cross_entropy")
KL = term_of("soft_target_kl", temperature=2.0)
KL_AT_1 = term_of("soft_target_kl")
SKEW = term_of("soft_target_skew_kl", skew=0.2)
SKEW_REVERSE = term_of("soft_target_skew_reverse_kl", skew=0.2)
OTHERS = (term_of("soft_target_jsd", beta=0.3), term_of("soft_target_tvd"))
TERMS = (CE, KL, term_of("soft_target_reverse_kl"), SKEW, SKEW_REVERSE, *OTHERS)
# DistiLLM-2: skew KL on texts of the teacher, skew reverse KL on texts of the student.
PAIR = (replace(SKEW, on="data"), replace(SKEW_REVERSE, on="rollouts", weight=0.5))
SOURCES = ("rollouts", "data")
UNITS = {None: "targets", "rollouts": "rollout_targets", "data": "data_targets"}
every_term = pytest.mark.parametrize("term", TERMS, ids=lambda term: term.loss)
every_source = pytest.mark.parametrize("source", SOURCES)
ROWS, LENGTH, VOCABULARY, DRAWN = 4, 5, VOCABULARIES[0], 4


def drawn_shares() -> torch.Tensor:
    """Shares of four draws at every position, [B, T, V]; each is of one or two tokens."""
    made = torch.Generator().manual_seed(5)
    first, second = torch.randint(VOCABULARY, (2, ROWS, LENGTH), generator=made)
    hot = [torch.nn.functional.one_hot(ids, VOCABULARY) for ids in (first, second)]
    return (3 * hot[0] + hot[1]) / DRAWN


def draws_of(shares: torch.Tensor) -> Draws:
    best, ids = shares.topk(DRAWN, dim=-1)
    return Draws(ids.masked_fill(best == 0, -1).int(), best.log())


def scene_of(*terms: Any, rollouts: bool = False) -> Scene:
    return Scene("causal_lm", *terms, rollouts=rollouts)


@every_source
@every_term
def test_texts_of_the_other_source_give_a_term_zero_with_gradients_of_zero(term, source):
    scene = scene_of(replace(term, on=source), rollouts=source == "data")
    scene.leaves["hidden"][0, 0] = math.nan

    actual = scene.result()

    assert actual.total.item() == 0.0
    assert all(value.item() == 0.0 for value in actual.sums.values())
    assert actual.gradients.keys() == {"hidden", "head"}
    assert not any(gradient.any() for gradient in actual.gradients.values())


@every_source
@every_term
def test_a_term_on_the_source_of_the_texts_is_the_term(term, source):
    limited, whole = (
        scene_of(one, rollouts=source == "rollouts").result()
        for one in (replace(term, on=source), term)
    )

    torch.testing.assert_close(limited.total, whole.total, rtol=0, atol=0)
    torch.testing.assert_close(limited.gradients, whole.gradients, rtol=0, atol=0)


def test_products_run_over_one_row_of_the_other_source(kernel_calls):
    calls = kernel_calls("linear_kd_loss")

    for rollouts in (False, True):
        scene_of(*PAIR, rollouts=rollouts).result()

    rows = [hidden.shape[:-1].numel() for (hidden, *_), _ in calls]
    assert rows == [1, ROWS * LENGTH, ROWS * LENGTH, 1]


@pytest.mark.parametrize("kind", [TopK, Draws])
def test_cached_answers_to_texts_of_the_other_source_give_zero(kind):
    draws = draws_of(drawn_shares())

    actual = scene_of(replace(KL_AT_1, on="rollouts")).result(
        teacher=Outputs(kept=kind(draws.ids, draws.logprobs))
    )

    assert actual.total.item() == 0.0
    assert not any(gradient.any() for gradient in actual.gradients.values())


@pytest.mark.parametrize(
    ("terms", "kind"), [(PAIR, "answered"), ((KL_AT_1,), "draws"), ((CE,), "two vocabularies")]
)
def test_readings_together_equal_each_by_itself(terms, kind):
    scene = scene_of(*terms)
    hidden, head = scene.leaves["hidden"], Matrix(scene.leaves["head"])
    one, other = scene.inputs(scale=0.5), Outputs(hidden=hidden * 0.3, head=head)
    if kind == "draws":
        one = replace(one, teacher=Outputs(kept=draws_of(drawn_shares())))
    elif kind == "two vocabularies":
        positions = (scene.labels != IGNORE).flatten().nonzero()[::2, 0]
        second = Targets(positions, scene.labels.flatten()[positions])
        of_second = Outputs(hidden=hidden.flatten(0, 1)[positions], head=head)
        other = Outputs(hidden=hidden, head=head, second=of_second)
        one = replace(one, teacher=None, batch=scene.batch()._replace(second=second), student=other)
    all_inputs = [one, replace(one, student=other, scale=0.25)]

    together = scene.objective(all_inputs)
    alone = [scene.objective([inputs])[0] for inputs in all_inputs]

    totals = [torch.stack([each.total for each in both]).sum() for both in (together, alone)]
    torch.testing.assert_close(*totals)
    for actual, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(actual.sums, wanted.sums)


def test_the_same_loss_on_both_sources_has_two_weights_and_two_values():
    terms = (replace(KL, on="data"), replace(KL, on="rollouts", weight=0.5), replace(CE, on="data"))
    names = ("soft_target_kl_on_data", "soft_target_kl_on_rollouts", "hard_cross_entropy_on_data")
    scene = scene_of(*terms)

    actual = scene.result()

    of_data, of_texts, hard = (actual.sums[name] for name in names)
    count = int((scene.labels != IGNORE).sum())
    assert actual.total.item() == pytest.approx(float(of_data + hard) / count)
    assert of_texts == 0
    assert scene.objective.weights == dict(zip(names, (1.0, 0.5, 1.0), strict=True))


@every_source
def test_a_limited_term_and_its_agreement_are_counted_in_targets_of_the_source(source):
    objective = scene_of(KL, replace(SKEW, on=source)).objective

    kept = ("soft_target_kl_top_k", "soft_target_kl_draws", "mass_outside_top_k")
    assert objective.units == {
        **dict.fromkeys(("soft_target_kl", "top1_agreement", *kept), "targets"),
        f"soft_target_skew_kl_on_{source}": UNITS[source],
        f"top1_agreement_on_{source}": UNITS[source],
    }
    assert UNITS[source] in objective.counters


def test_the_loss_is_the_divergence_from_the_shares_of_the_draws():
    scene, shares = scene_of(KL_AT_1), drawn_shares()
    counted = scene.labels != IGNORE
    hidden, head = (scene.leaves[name].clone().requires_grad_() for name in ("hidden", "head"))

    actual = scene.result(teacher=Outputs(kept=draws_of(shares)))

    log_q = (hidden @ head.T).log_softmax(-1)
    rows = (torch.xlogy(shares, shares) - shares * log_q).sum(-1)[counted]
    torch.testing.assert_close(actual.sums["soft_target_kl_draws"], rows.sum().detach())
    assert "soft_target_kl" not in actual.sums
    gradients = torch.autograd.grad(rows.mean(), (hidden, head))
    for name, expected in zip(("hidden", "head"), gradients, strict=True):
        torch.testing.assert_close(actual.gradients[name], expected, rtol=1e-4, atol=1e-6)
    broadcast = log_q.argmax(-1) == shares.argmax(-1)
    assert actual.sums[AGREEMENT] == broadcast[counted].sum()


@pytest.mark.parametrize("source", [None, "data"])
def test_the_divergence_over_k_tokens_has_a_name_of_its_own_beside_the_mass_outside(source):
    scene = scene_of(replace(KL_AT_1, on=source))
    counted = scene.labels != IGNORE
    made = torch.Generator().manual_seed(6)
    log_p = torch.randn(ROWS, LENGTH, VOCABULARY, generator=made).log_softmax(-1)
    best, ids = log_p.topk(3, dim=-1)
    ids[0, 0] = -1  # a position without an answer

    sums = scene.result(teacher=Outputs(kept=TopK(ids, best))).sums

    outside = 1 - best.exp().sum(-1)
    outside[0, 0] = 0.0
    log_q = (
        (scene.leaves["hidden"] @ scene.leaves["head"].T)
        .log_softmax(-1)
        .gather(-1, ids.clamp(min=0))
    )
    rest = outside * (outside / (1 - log_q.exp().sum(-1))).log()
    rows = ((best.exp() * (best - log_q)).sum(-1) + rest).masked_fill(ids[..., 0] < 0, 0.0)
    end = "" if source is None else f"_on_{source}"
    torch.testing.assert_close(sums[f"soft_target_kl_top_k{end}"], rows[counted].sum())
    torch.testing.assert_close(sums[f"mass_outside_top_k{end}"], outside[counted].sum())
    assert f"soft_target_kl{end}" not in sums


@pytest.mark.parametrize("kind", [Draws, TopK])
def test_tokens_that_only_the_teachers_table_has_are_left_to_the_rest(kind):
    scene, draws = scene_of(KL_AT_1), draws_of(drawn_shares())
    missing = draws.ids == draws.ids.amax(-1, keepdim=True)

    actual, expected = (
        scene.result(
            teacher=Outputs(kept=kind(draws.ids.masked_fill(missing, ids), draws.logprobs - 1))
        )
        for ids in (VOCABULARY + 3, -1)
    )

    torch.testing.assert_close(actual.total, expected.total)
    assert actual.total.isfinite()
    torch.testing.assert_close(actual.gradients, expected.gradients)
