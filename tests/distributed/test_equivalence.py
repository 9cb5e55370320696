"""Losses, gradients and weights at any ranks, ZeRO stages and cuts equal one plain process."""

from __future__ import annotations

import pytest
import torch
from equal_runs import (
    CLASSIFICATION,
    CUTS,
    INNER,
    LANGUAGE,
    PACKED,
    assert_same,
    assert_same_shards,
    cut_of,
    plain_run,
)

RECOMPUTED = {"gradient_checkpointing": True}
OFFLOADED = {"deepspeed": "teacher_zero3_offload"}
CHUNKED, REFERENCE = {"kernels": "chunked"}, {"kernels": "reference"}


def terms_of(student):
    return CLASSIFICATION if student.startswith("bert") else LANGUAGE


# (student, ZeRO stage of the student, of the teacher); CUT has (2, 3).
STAGES = [("bert-student", *stages) for stages in ((0, 0), (1, 3), (3, 3))]
STAGES += [("llama-tied", 3, 3), ("llama-untied", 3, 0), ("masked-untied", 2, 0)]
STAGES += [("masked-tied", 3, 3), ("masked-distilbert", 3, 3)]
SLOW = [("bert-student", 3, 0), ("llama-tied", 0, 0), ("llama-tied", 1, 0), ("llama-untied", 1, 3)]
SLOW += [("llama-untied", 3, 3), ("masked-roberta", 3, 3)]
SLOW += [("masked-tied", *stages) for stages in ((0, 3), (1, 0), (2, 3))]
# Micro-batches and ranks for every kind of student, either of them alone for one.
CUT = [("bert-student", CUTS[1]), ("bert-student", CUTS[3]), ("llama-tied", CUTS[3])]
CUT += [("masked-tied", CUTS[5])]
SLOW_CUT = [("bert-student", CUTS[2]), ("bert-student", CUTS[4]), ("llama-tied", CUTS[4])]
SLOW_CUT += [("masked-tied", CUTS[1])]
ONE_BY_ONE = {"joins_micro_batches": False}


def cases(stages, cuts):
    """(student, its terms, stages, ranks, sections of the config)"""
    yield from ((student, terms_of(student), zero, 2, {}) for student, *zero in stages)
    for student, cut in cuts:
        yield student, terms_of(student), (2, 3), cut[0], {"train": cut_of(cut)}


CASES = [
    *cases(STAGES, CUT),
    # The answers of a teacher to a whole step at once are those to one micro-batch after another.
    ("llama-tied", LANGUAGE, (2, 3), 2, {"teacher": ONE_BY_ONE}),
    ("bert-student", INNER, (0, 3), 2, {"train": REFERENCE}),
    ("bert-student", INNER, (3, 3), 2, {}),
    ("llama-tied", INNER, (2, 0), 2, {"train": CHUNKED}),
    ("llama-tied", INNER, (3, 3), 2, {"train": RECOMPUTED}),
    ("llama-untied", LANGUAGE, (2, 3), 2, {"train": PACKED}),
    ("lfm2-student", LANGUAGE, (3, 3), 2, {}),
    ("bert-student", CLASSIFICATION, (2, 3), 2, {"teacher": OFFLOADED}),
]
SLOW_CASES = [
    *cases(SLOW, SLOW_CUT),
    ("lfm2-student", LANGUAGE, (2, 0), 3, {"train": cut_of(CUTS[5])}),
    ("bert-student", INNER, (1, 0), 2, {"train": RECOMPUTED}),
    ("masked-tied", INNER, (2, 3), 2, {}),
    ("llama-untied", INNER, (3, 0), 2, {"train": RECOMPUTED | REFERENCE}),
]


@pytest.mark.parametrize(
    ("student", "terms", "stages", "ranks", "sections"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_a_student_distils_as_in_one_plain_process(distil, student, terms, stages, ranks, sections):
    path, result = distil(student, terms, stages, ranks=ranks, **sections)

    assert_same(result[0], plain_run(path, terms, result[0]["initial"]))
    if stages[0] == 3:  # the student is really sharded
        whole = sum(weight.numel() for weight in result[0]["initial"].values())
        assert all(rank["local_elements"] <= 0.51 * whole for rank in result)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_shards_of_a_bf16_student_are_its_fp32_weights_and_gradients(distil, stage):
    _, result = distil("bert-student", CLASSIFICATION, (stage, 0), steps=1, train={"bf16": True})

    assert_same_shards(result[0])


# Nothing but a layer's projections has a gradient then, and the layer is repeated in the backward.
@pytest.mark.parametrize(("student", "stage"), [("masked-tied", 3), ("llama-tied", 2)])
def test_relations_can_be_all_that_is_learned(distil, student, stage):
    alone = {"relation_kl": 1.0}

    path, (actual, _) = distil(student, alone, (stage, 3), steps=1, train=RECOMPUTED)

    expected = plain_run(path, alone, actual["initial"])
    assert actual["losses"][0]["relation_kl"] == pytest.approx(expected["losses"][0]["relation_kl"])
    for name, gradient in actual["gradients"][0].items():
        wanted = expected["gradients"][0].get(name, torch.zeros_like(gradient))
        assert torch.allclose(gradient, wanted, atol=1e-6), name
