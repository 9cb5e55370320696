"""Fit of terms to models, and the divisors of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from loss_scene import term_of

from megakd.config.terms import Heads, Shape, layer_pairs
from megakd.errors import ConfigError, TeacherError
from megakd.losses.objective import build_objective, check_terms, relation_heads, teacher_needs
from megakd.models.outputs import Needs

CE = term_of("hard_cross_entropy")
SOFT = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "mse")
KL, REVERSE, JSD, *OTHERS, SOFT_MSE = (term_of(f"soft_target_{name}") for name in SOFT)
STATES = ("hidden_mse", "hidden_cosine", "embedding_mse")
HIDDEN_MSE, HIDDEN_COSINE, EMBEDDING = map(term_of, STATES)
ATTENTION, RELATION, FLOWS = map(term_of, ("attention_mse", "relation_kl", "relation_fsp"))
INNER = (HIDDEN_MSE, HIDDEN_COSINE, EMBEDDING, ATTENTION, RELATION, FLOWS)
COMPARING = (KL, REVERSE, JSD, *OTHERS, SOFT_MSE, *INNER)
STUDENT, TEACHER = Shape(2, 4, 3, Heads(2, 2, 2)), Shape(12, 6, 3, Heads(2, 2, 3))


@pytest.mark.parametrize(
    ("mapping", "student", "teacher", "pairs"),
    [
        ("uniform", 4, 12, ((1, 3), (2, 6), (3, 9), (4, 12))),
        ("uniform", 3, 3, ((1, 1), (2, 2), (3, 3))),
        ("uniform", 4, 6, ((1, 2), (2, 3), (3, 4), (4, 6))),  # 1.5 and 4.5 round to even
        ("uniform", 1, 6, ((1, 6),)),
        ("last", 4, 12, ((4, 12),)),
        (("0:0", "2:11"), 2, 12, ((0, 0), (2, 11))),  # 0 is the embedding output
    ],
)
def test_layers_are_mapped_as_the_config_says(mapping, student, teacher, pairs):
    term = replace(HIDDEN_MSE, layer_mapping=mapping)

    assert layer_pairs(term, Shape(student, 4, 3), Shape(teacher, 4, 3)) == pairs
    # Attention is never mapped to the embedding output.
    of_fewer = replace(ATTENTION, layer_mapping="uniform"), Shape(4, 4, 3), Shape(2, 4, 3)
    assert layer_pairs(*of_fewer) == ((1, 1), (2, 1), (3, 2), (4, 2))


@pytest.mark.parametrize("term", COMPARING, ids=lambda term: term.loss)
def test_a_term_that_compares_is_refused_without_a_teacher(term):
    task = "regression" if term is SOFT_MSE else "classification"

    with pytest.raises(ConfigError, match=f"{term.loss} compares with a teacher, and this stage"):
        build_objective((term,), task, STUDENT, None)


@pytest.mark.parametrize(
    ("terms", "student", "teacher"),
    [
        ((CE, KL), Needs(), Needs()),
        ((CE, HIDDEN_COSINE), Needs((1, 2)), Needs((6, 12))),
        ((EMBEDDING,), Needs((0,)), Needs((0,))),
        ((EMBEDDING, FLOWS), Needs((0, 1, 2)), Needs((0, 6, 12))),
        ((RELATION,), Needs((), (2,)), Needs((), (12,))),
        ((ATTENTION, RELATION), Needs((), (1, 2)), Needs((), (6, 12))),
    ],
)
def test_a_model_is_asked_for_what_the_terms_read_and_nothing_else(terms, student, teacher):
    assert build_objective(terms, "classification", STUDENT, TEACHER).needs == student
    assert teacher_needs(terms, STUDENT, TEACHER) == teacher


BEYOND = "a layer does not exist; the student has layers 0 to 2, the teacher 0 to 12"


@pytest.mark.parametrize(
    ("term", "pair", "message"),
    [
        (HIDDEN_MSE, "7:1", BEYOND),
        (HIDDEN_COSINE, "1:13", BEYOND),
        *((term, "3:1", BEYOND) for term in (ATTENTION, RELATION)),
        *((t, pair, "0 is the embedd") for t in (ATTENTION, RELATION) for pair in ("0:1", "1:0")),
    ],
)
def test_a_pair_of_layers_that_cannot_be_compared_is_refused_as_written(term, pair, message):
    wrong = replace(term, layer_mapping=("1:1", pair))

    with pytest.raises(TeacherError, match=rf"{term.loss}\.layer_mapping {pair}: {message}"):
        check_terms((CE, wrong), STUDENT, TEACHER)


@pytest.mark.parametrize("term", [ATTENTION, RELATION], ids=lambda term: term.loss)
def test_a_teacher_whose_attention_is_not_supported_is_refused(term):
    message = f"{term.loss}: megakd does not support the attention of the teacher"
    with pytest.raises(TeacherError, match=message):
        check_terms((term,), STUDENT, Shape(12, 64, 3, None))


def heads_of(student: Heads, teacher: Heads, **options: Any) -> int:
    term = term_of("relation_kl", **options)
    return relation_heads(term, Shape(2, 4, 3, student), Shape(12, 6, 3, teacher))


def test_relations_have_the_teachers_heads_unless_told_otherwise():
    student, teacher = Heads(4, 4, 6), Heads(12, 12, 4)

    assert heads_of(student, teacher) == 12
    assert heads_of(student, teacher, relation_heads=8) == 8
    # What is not compared sets no bounds.
    assert heads_of(Heads(12, 4, 8), Heads(12, 3, 16), relations=("query",)) == 12


QUERIES = {"relations": ("query_key",)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # the grouped keys of the student
        ({}, r"12 \(null: the teacher's .*\) does not .* key vectors, .* 32 .* 1, 2, 4, 8, 16$"),
        # only what is compared
        (QUERIES | {"relation_heads": 7}, r"7 does not .* query vectors, .* 96 .* 32, 48, 96$"),
    ],
)
def test_relation_heads_that_do_not_divide_are_refused_with_those_that_would(options, message):
    with pytest.raises(TeacherError, match=f"relation_heads {message}"):
        heads_of(Heads(12, 4, 8), Heads(12, 3, 16), **options)
