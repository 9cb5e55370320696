"""Which candidates learn in a step, which one is chosen, and what a config may not say."""

from __future__ import annotations

import pytest

from megakd.contract.tasks import METRICS
from megakd.errors import ConfigError
from megakd.methods.minidisc import Sandwich, TradeoffJudge
from megakd.scoring.scores import headline, weighable

ACCURACY = headline(["accuracy"])
BOTH = headline(["accuracy", "f1"])
NAMES = ("sparsity-0.5", "sparsity-0.7", "sparsity-0.8", "sparsity-0.9", "sparsity-0.95")


def judged(scores: dict[float, float], *, tradeoff: float = 0.2, target: float = 0.9, **options):
    judge = TradeoffJudge(ACCURACY, tuple(scores), tradeoff, target, **options)
    return judge({f"sparsity-{s:g}": {"accuracy": value} for s, value in scores.items()}, 0)


def test_all_candidates_learn_in_every_step_and_the_loss_is_their_mean():
    plan = Sandwich("teacher", NAMES).passes(7)

    assert [planned.view for planned in plan] == list(NAMES)
    assert {planned.teacher for planned in plan} == {"teacher"}
    assert sum(planned.scale for planned in plan) == pytest.approx(1.0)
    assert len({planned.scale for planned in plan}) == 1


@pytest.mark.parametrize("sampled", [0, 1, 2])
def test_the_sandwich_rule_keeps_the_ends_and_draws_the_middle(sampled):
    sandwich = Sandwich("teacher", NAMES, sampled, seed=3)
    plans = [[planned.view for planned in sandwich.passes(step)] for step in range(60)]

    for plan in plans:
        assert len(plan) == sampled + 2
        assert (plan[0], plan[-1]) == (NAMES[0], NAMES[-1])
        assert plan == sorted(plan, key=NAMES.index)
    drawn = {view for plan in plans for view in plan[1:-1]}
    assert drawn == (set(NAMES[1:-1]) if sampled else set())


def test_a_step_draws_the_same_candidates_whenever_it_is_asked():
    first, again = (Sandwich("teacher", NAMES, 1, seed=3) for _ in range(2))
    other = Sandwich("teacher", NAMES, 1, seed=4)

    assert [first.passes(step) for step in range(20)] == [again.passes(step) for step in range(20)]
    assert [first.passes(step) for step in range(20)] != [other.passes(step) for step in range(20)]


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:2]])
def test_a_grid_without_a_middle_learns_whole(names):
    plan = Sandwich("teacher", names, 1).passes(0)

    assert [planned.view for planned in plan] == list(names)


def test_the_best_tradeoff_is_chosen_and_is_what_the_evaluation_is_worth():
    verdict = judged({0.5: 0.80, 0.7: 0.79, 0.9: 0.60})

    assert verdict.view == "sparsity-0.7"
    assert verdict.score == pytest.approx(0.79 + 0.2 * 0.7)


def test_a_best_candidate_beyond_the_target_gives_way_to_the_target():
    verdict = judged({0.5: 0.5, 0.9: 0.8, 0.95: 0.82})

    assert verdict.view == "sparsity-0.9"
    assert verdict.score == pytest.approx(0.82 + 0.2 * 0.95)


def test_a_target_that_may_not_win_leaves_the_choice_to_the_less_sparse():
    scores = {0.5: 0.5, 0.7: 0.6, 0.9: 0.8, 0.95: 0.82}

    verdict = judged(scores, target_may_win=False)

    assert verdict.view == "sparsity-0.7"
    assert verdict.score == pytest.approx(0.6 + 0.2 * 0.7)
    assert verdict.own == {}


def test_of_the_target_its_own_best_evaluation_is_asked_for():
    assert judged({0.5: 0.80, 0.7: 0.79, 0.9: 0.60}).own == {"sparsity-0.9": 0.60}


def test_without_a_weight_on_size_the_best_score_is_chosen():
    assert judged({0.5: 0.80, 0.7: 0.79, 0.9: 0.60}, tradeoff=0.0).view == "sparsity-0.5"


def test_a_metric_of_which_less_is_better_cannot_be_weighed():
    with pytest.raises(
        ConfigError, match=r"method.metric: perplexity, the default of this task.*to accuracy"
    ):
        weighable(None, headline(["perplexity"]), METRICS["causal_lm"])
    assert weighable("accuracy", headline(["perplexity"]), METRICS["causal_lm"]) == ACCURACY


def test_one_of_several_metrics_may_be_weighed_and_no_other():
    assert weighable("f1", BOTH, BOTH.parts) == headline(["f1"])
    assert weighable(None, BOTH, BOTH.parts).parts == ("accuracy", "f1")
    with pytest.raises(ConfigError, match=r"method.metric: recall cannot.*accuracy, f1"):
        weighable("recall", BOTH, BOTH.parts)
