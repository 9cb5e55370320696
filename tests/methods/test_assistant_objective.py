"""The objective of candidates, and the heads that it needs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import BertConfig, LlamaConfig, PretrainedConfig

from megakd.contract.terms import RelationKl, SoftTargetKl
from megakd.errors import ConfigError, TeacherError
from megakd.methods.assistants import check_reach, objective_of, views_of
from megakd.methods.direct import DirectConfig
from megakd.methods.maxidisc import MaxiDiscConfig
from megakd.methods.minidisc import MiniDiscConfig
from megakd.models.source import ModelSource
from megakd.models.structure import architecture_of
from megakd.pruning.allocation import UnitScores
from megakd.pruning.builder import SortedTeacher, unscored

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
        given=lambda role: source,
        pruning=SimpleNamespace(unscored=lambda: unscored(source)),
        soft_terms=lambda weight: (SoftTargetKl(loss="soft_target_kl", weight=weight),),
        metric=lambda name: name,
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


GRID = {"target_sparsity": 0.5, "sparsities": (0.5, 0.95), "allocation": "uniform"}


@pytest.mark.parametrize("method", [DirectConfig, MaxiDiscConfig])
def test_a_sparsity_that_is_never_cut_at_is_not_checked(method):
    few_heads = lab(BertConfig(**{**BASE, "num_attention_heads": 4}))

    check_reach(method(name=method.__name__.removesuffix("Config").lower(), **GRID), few_heads)
    with pytest.raises(TeacherError, match=r"would keep 0 \(at sparsity"):
        check_reach(MiniDiscConfig(name="minidisc", **GRID), few_heads)


def test_a_metric_is_asked_for_only_where_something_is_weighed():
    teacher, asked = lab(BertConfig(**BASE)), list[str | None]()
    teacher.metric = asked.append

    check_reach(PLAIN, teacher)
    check_reach(MaxiDiscConfig(name="maxidisc", metric="f1"), teacher)

    assert asked == ["f1"]


def test_a_layer_whose_relations_are_compared_keeps_a_head():
    teacher = lab(BertConfig(**BASE), (relations(relation_heads=4, layer_mapping=("2:4",)), SOFT))
    heads = tuple((float(layer != 3),) * 12 for layer in range(4))
    neurons = tuple((float(layer != 3),) * 3072 for layer in range(4))
    scores = UnitScores(heads, neurons)
    ranked = SortedTeacher(source=teacher.pruning.unscored().source, scores=scores)

    view = views_of(PLAIN, teacher, ranked, [0.9])["sparsity-0.9"]

    assert view.heads[3] == 1
    assert view.heads[1] > 0
    assert view.neurons[3] == 0
