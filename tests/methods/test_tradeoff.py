"""The trade-off of score and size, who wins it, the objective of candidates, and its heads."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
from transformers import BertConfig, LlamaConfig, PretrainedConfig

from megakd.config.task import METRICS
from megakd.config.terms import RelationKl, SoftTargetKl
from megakd.errors import ConfigError, TeacherError, TrainingError
from megakd.methods.assistants import check_reach, choose, objective_of, tradeoff, views_of
from megakd.methods.direct import DirectConfig
from megakd.methods.maxidisc import MaxiDiscConfig
from megakd.methods.minidisc import MiniDiscConfig, TradeoffJudge
from megakd.models.fitting import ModelSource
from megakd.models.structure import architecture_of
from megakd.training.allocation import SortedTeacher, UnitScores
from megakd.training.facts import unscored
from megakd.training.metrics import check_weighed, headline

LAMBDA = 0.2
READ = 0.0025  # what the authors' figure can be read to
# Figure of the authors: metric of the assistant by its sparsity, and the trade-off as drawn.
MRPC = {0.3: 0.915, 0.4: 0.913, 0.5: 0.9125, 0.6: 0.899, 0.7: 0.889, 0.8: 0.8705, 0.9: 0.867}
MRPC_DRAWN = {0.3: 0.973, 0.4: 0.993, 0.5: 1.012, 0.6: 1.019, 0.8: 1.030}
QQP = {0.3: 0.8875, 0.4: 0.886, 0.5: 0.8826, 0.6: 0.881, 0.7: 0.877, 0.8: 0.8695, 0.9: 0.8435}
QQP_DRAWN = {0.3: 0.947, 0.4: 0.966, 0.5: 0.982, 0.6: 1.001, 0.7: 1.017, 0.8: 1.029}
GRID = {0.5: 0.90, 0.7: 0.91, 0.9: 0.80, 0.95: 0.70}


def chosen(scores, *, weight=LAMBDA, target=0.9):
    return choose(scores, weight=weight, target=target)


@pytest.mark.parametrize(
    ("metrics", "drawn"), [(MRPC, MRPC_DRAWN), (QQP, QQP_DRAWN)], ids=["MRPC", "QQP"]
)
def test_the_trade_off_is_the_one_that_the_authors_drew(metrics, drawn):
    # MRPC at 0.7 is left out: the formula says 1.029 and the figure 1.037.
    computed = {sparsity: tradeoff(metrics[sparsity], sparsity, LAMBDA) for sparsity in drawn}

    assert computed == pytest.approx(drawn, abs=READ)


@pytest.mark.parametrize(
    ("scores", "options", "chosen_one"),
    [
        (QQP, {}, (0.8, pytest.approx(1.0295))),
        # By the code of the authors there is no assistant.
        (MRPC, {}, (0.9, pytest.approx(1.047))),
        (GRID, {"weight": 0.0}, (0.7, 0.91)),
        # The target is taken in place of a sparser one.
        ({0.5: 0.5, 0.9: 0.8, 0.95: 0.99}, {}, (0.9, pytest.approx(1.18))),
        *((GRID, {"weight": w, "target": 0.95}, (0.95, w * 0.95 + 0.7)) for w in (1e6, 1e300)),
        # Equal trade-offs go to the sparser candidate.
        ({0.5: 0.75, 0.25: 0.8125, 0.9: 0.0}, {"weight": 0.25}, (0.5, 0.875)),
        # A correlation may be negative, or above one by a rounding error.
        ({0.5: -0.3, 0.9: -1.0}, {}, (0.5, pytest.approx(-0.2))),
        ({0.5: 1.0 + 1e-12, 0.9: 0.0}, {}, (0.5, pytest.approx(1.1))),
    ],
)
def test_the_highest_trade_off_is_chosen(scores, options, chosen_one):
    assert chosen(scores, **options) == chosen_one
    assert chosen(dict(reversed(scores.items())), **options) == chosen_one


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (math.nan, TrainingError, r"sparsity 0\.7 has no score \(nan\)"),
        *(
            (score, ConfigError, r"0\.7 scores .*eval\.metric, for example to accuracy")
            for score in (38.2, -1.5, math.inf)
        ),
    ],
)
def test_a_score_that_is_no_fraction_is_refused_with_a_metric_that_is(score, error, message):
    with pytest.raises(error, match=message):
        chosen(GRID | {0.7: score})


ACCURACY = headline(["accuracy"])


@pytest.mark.parametrize(
    ("scores", "chosen", "worth", "target"),
    [
        ({0.5: 0.80, 0.7: 0.79, 0.9: 0.60}, 0.7, 0.79 + LAMBDA * 0.7, 0.60),
        # Beyond the target.
        ({0.5: 0.5, 0.9: 0.8, 0.95: 0.82}, 0.9, 0.82 + LAMBDA * 0.95, 0.8),
    ],
)
def test_the_best_tradeoff_is_chosen_and_the_target_has_its_own_score(
    scores, chosen, worth, target
):
    judge = TradeoffJudge(ACCURACY, tuple(scores), LAMBDA, 0.9)

    verdict = judge({f"sparsity-{s:g}": {"accuracy": value} for s, value in scores.items()}, 0)

    assert verdict.view == f"sparsity-{chosen:g}"
    assert verdict.score == pytest.approx(worth)
    assert verdict.of_views == {"sparsity-0.9": target}


def test_only_a_metric_of_which_more_is_better_is_weighed():
    check_weighed(headline(["accuracy", "f1"]), METRICS["classification"])
    with pytest.raises(ConfigError, match=r"eval.metric: perplexity cannot.*to accuracy"):
        check_weighed(headline(["perplexity"]), METRICS["causal_lm"])


# What candidates learn from.


PLAIN = DirectConfig(name="direct")
BASE = {"num_hidden_layers": 4, "hidden_size": 768, "num_attention_heads": 12}
SOFT = SoftTargetKl(loss="soft_target_kl")


def relations(**options) -> RelationKl:
    return RelationKl(loss="relation_kl", **options)


def lab(config: PretrainedConfig, objective=None):
    """As much of a lab as the choice of losses and views needs."""
    source = ModelSource(
        name="teacher",
        where="teacher.model",
        config=config,
        architecture=architecture_of(config),
        folder=None,
        stored={},
    )
    return SimpleNamespace(
        config=SimpleNamespace(objective=objective),
        configured_model=lambda role: source,
        facts=SimpleNamespace(unscored=lambda: unscored(source), metric=lambda: None),
        soft_terms=lambda weight: (SoftTargetKl(loss="soft_target_kl", weight=weight),),
    )


def test_hidden_states_of_one_width_are_compared_and_relations_have_the_teachers_heads():
    alone = objective_of(lab(BertConfig(**BASE)))
    teacher = lab(BertConfig(**BASE), (SOFT, relations(), relations(relation_heads=4)))

    assert [term.loss for term in alone] == ["hidden_mse", "soft_target_kl"]
    assert objective_of(teacher) == (
        SOFT,
        relations(relation_heads=12),
        relations(relation_heads=4),
    )


@pytest.mark.parametrize(
    ("term", "fits"),
    [
        (relations(), False),  # 12 of 64
        (relations(relation_heads=64), True),
        (relations(relation_heads=128), False),
        (relations(relation_heads=128, relations=("query",)), True),  # two heads share keys
        (relations(relation_heads=128, relations=("query_key",)), True),
        (relations(relation_heads=128, relations=("query", "value")), False),
    ],
)
def test_every_number_of_heads_must_fall_into_the_parts_of_the_relations(term, fits):
    teacher = lab(LlamaConfig(**BASE, num_key_value_heads=6, head_dim=64), (term,))

    if fits:
        check_reach(PLAIN, teacher)
        return
    with pytest.raises(ConfigError, match=r"does not divide 64, .* 1, 2, 4, 8, 16, 32, 64$"):
        check_reach(PLAIN, teacher)


SPARSE = {"target_sparsity": 0.5, "sparsities": (0.5, 0.95), "allocation": "uniform"}


def test_a_sparsity_that_is_never_cut_at_is_not_checked():
    few_heads = lab(BertConfig(**{**BASE, "num_attention_heads": 4}))

    check_reach(MaxiDiscConfig(name="maxidisc", **SPARSE), few_heads)
    with pytest.raises(TeacherError, match=r"would keep 0 \(at sparsity"):
        check_reach(MiniDiscConfig(name="minidisc", **SPARSE), few_heads)


def test_a_metric_is_asked_for_only_where_something_is_weighed():
    teacher, asked = lab(BertConfig(**BASE)), list[str]()

    for config in (PLAIN, MaxiDiscConfig(name="maxidisc")):
        teacher.facts.metric = partial(asked.append, config.name)
        check_reach(config, teacher)

    assert asked == ["maxidisc"]


def test_a_layer_whose_relations_are_compared_keeps_a_head():
    teacher = lab(BertConfig(**BASE), (relations(relation_heads=4, layer_mapping=("2:4",)), SOFT))
    heads = tuple((float(layer != 3),) * 12 for layer in range(4))
    neurons = tuple((float(layer != 3),) * 3072 for layer in range(4))
    scores = UnitScores(heads, neurons)
    ranked = SortedTeacher(source=teacher.facts.unscored().source, scores=scores)

    view = views_of(PLAIN, teacher, ranked, [0.9])["sparsity-0.9"]

    assert view.heads[3] == 1
    assert view.heads[1] > 0
    assert view.neurons[3] == 0
