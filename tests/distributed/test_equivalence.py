"""Losses, gradients and weights at any ranks, ZeRO stages and cuts equal one plain process."""

from __future__ import annotations

import pytest
import torch
from equal_runs import (
    CLASSIFICATION,
    CUTS,
    INNER,
    LANGUAGE,
    STEPS,
    assert_same,
    assert_same_shards,
    config_tree,
    plain_run,
    write,
    write_folder,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("equivalence"))


def slow(cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


SHARDED = [(0, 0), (1, 3), (2, 3), (3, 0), (3, 3)]
SLOW_SHARDED = [(0, 3), (1, 0), (2, 0)]


@pytest.mark.parametrize(("student_zero", "teacher_zero"), [*SHARDED, *slow(SLOW_SHARDED)])
def test_a_classifier_distils_as_in_one_plain_process(
    workers, folder, tmp_path, student_zero, teacher_zero
):
    tree = config_tree(
        folder, "bert-student", CLASSIFICATION, student_zero=student_zero, teacher_zero=teacher_zero
    )
    path = write(tree, tmp_path / "config.yaml")

    found = workers(2).run("train", path, [], STEPS)[0]

    assert_same(found, plain_run(path, CLASSIFICATION, found["initial"]))


@pytest.mark.parametrize("student_zero", [0, 1, 2, 3])
def test_the_shards_of_a_bf16_student_are_its_fp32_weights_and_gradients(
    workers, folder, tmp_path, student_zero
):
    tree = config_tree(
        folder, "bert-student", CLASSIFICATION, student_zero=student_zero, teacher_zero=0
    )
    path = write(tree, tmp_path / "config.yaml")

    found = workers(2).run("train", path, ["train.bf16=true"], 1)[0]

    assert_same_shards(found)


LLAMAS = [("llama-tied", *stages) for stages in ((0, 0), (1, 3), (2, 0), (3, 3))]
LLAMAS += [("llama-untied", *stages) for stages in ((2, 0), (3, 3))]
SLOW_LLAMAS = [("llama-tied", *stages) for stages in ((2, 3), (3, 0))]
SLOW_LLAMAS += [("llama-untied", *stages) for stages in ((0, 0), (1, 3), (2, 3), (3, 0))]


@pytest.mark.parametrize(("student", "student_zero", "teacher_zero"), [*LLAMAS, *slow(SLOW_LLAMAS)])
def test_a_language_model_distils_as_in_one_plain_process(
    workers, folder, tmp_path, student, student_zero, teacher_zero
):
    tree = config_tree(
        folder, student, LANGUAGE, student_zero=student_zero, teacher_zero=teacher_zero
    )
    path = write(tree, tmp_path / "config.yaml")

    found = workers(2).run("train", path, [], STEPS)[0]

    assert_same(found, plain_run(path, LANGUAGE, found["initial"]))


MASKED = [("masked-tied", student, 3) for student in range(4)]
MASKED += [("masked-untied", *stages) for stages in ((2, 0), (3, 3))]
SLOW_MASKED = [("masked-tied", student, 0) for student in range(4)] + [("masked-untied", 0, 3)]
MASKED += [(f"masked-{family}", 3, 3) for family in ("roberta", "distilbert")]


@pytest.mark.parametrize(("student", "student_zero", "teacher_zero"), [*MASKED, *slow(SLOW_MASKED)])
def test_a_masked_lm_distils_as_in_one_plain_process(
    workers, folder, tmp_path, student, student_zero, teacher_zero
):
    tree = config_tree(
        folder, student, LANGUAGE, student_zero=student_zero, teacher_zero=teacher_zero
    )
    path = write(tree, tmp_path / "config.yaml")

    found = workers(2).run("train", path, [], STEPS)[0]

    assert_same(found, plain_run(path, LANGUAGE, found["initial"]))


# (student, student's ZeRO stage, teacher's, train.gradient_checkpointing, train.kernels)
INNER_CASES = [
    ("bert-student", 0, 3, False, "reference"),
    ("bert-student", 1, 0, True, "auto"),
    ("bert-student", 3, 3, False, "auto"),
    ("masked-tied", 2, 3, False, "auto"),
    ("llama-tied", 2, 0, False, "chunked"),
    ("llama-untied", 2, 3, True, "reference"),
    ("llama-tied", 3, 3, True, "auto"),
    *slow([("llama-untied", 3, 0, False, "reference")]),
]


@pytest.mark.parametrize(
    ("student", "student_zero", "teacher_zero", "checkpointing", "kernels"), INNER_CASES
)
def test_attention_relations_and_embeddings_distil_as_in_one_plain_process(
    workers, folder, tmp_path, student, student_zero, teacher_zero, checkpointing, kernels
):
    tree = config_tree(folder, student, INNER, student_zero=student_zero, teacher_zero=teacher_zero)
    tree["train"] |= {"gradient_checkpointing": checkpointing, "kernels": kernels}
    path = write(tree, tmp_path / "config.yaml")

    found = workers(2).run("train", path, [], STEPS)[0]

    assert_same(found, plain_run(path, INNER, found["initial"]))


# Nothing but a layer's projections has a gradient then, and the layer is repeated in the backward.
@pytest.mark.parametrize(("student", "student_zero"), [("masked-tied", 3), ("llama-tied", 2)])
def test_relations_can_be_all_that_is_learned(workers, folder, tmp_path, student, student_zero):
    alone = {"relation_kl": 1.0}
    tree = config_tree(folder, student, alone, student_zero=student_zero, teacher_zero=3)
    tree["train"] |= {"gradient_checkpointing": True}
    path = write(tree, tmp_path / "config.yaml")

    found = workers(2).run("train", path, [], 1)[0]

    expected = plain_run(path, alone, found["initial"])
    assert found["losses"][0]["relation_kl"] == pytest.approx(expected["losses"][0]["relation_kl"])
    for name, gradient in found["gradients"][0].items():
        wanted = expected["gradients"][0].get(name, torch.zeros_like(gradient))
        assert torch.allclose(gradient, wanted, atol=1e-6), name


# Micro-batches and ranks for every kind of student, either of them alone for one.
CUT_CASES = [("bert-student", *cut) for cut in CUTS]
LANGUAGE_CUTS = [(kind, *cut) for kind in ("llama-tied", "masked-tied") for cut in CUTS]
CUT_CASES += [case for case in LANGUAGE_CUTS if case[-1] > 1]


@pytest.mark.parametrize(
    ("student", "ranks", "size", "accumulation"),
    [*CUT_CASES, *slow(case for case in LANGUAGE_CUTS if case not in CUT_CASES)],
)
def test_the_cut_of_a_step_into_ranks_and_micro_batches_changes_nothing(
    workers, folder, tmp_path, student, ranks, size, accumulation
):
    weights = CLASSIFICATION if student.startswith("bert") else LANGUAGE
    tree = config_tree(folder, student, weights, student_zero=2, teacher_zero=3)
    tree["train"] |= {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
    }
    path = write(tree, tmp_path / "config.yaml")

    found = workers(ranks).run("train", path, [], STEPS)[0]

    assert_same(found, plain_run(path, weights, found["initial"]))


def test_a_sharded_student_is_really_sharded(workers, folder, tmp_path):
    tree = config_tree(folder, "bert-student", CLASSIFICATION, student_zero=3, teacher_zero=3)
    path = write(tree, tmp_path / "config.yaml")

    shares = workers(2).run("train", path, [], 1)

    whole = sum(tensor.numel() for tensor in shares[0]["initial"].values())
    assert all(share["local_elements"] <= 0.51 * whole for share in shares)


@pytest.mark.parametrize("student", ["bert-student", "llama-tied", "masked-tied"])
def test_a_teacher_that_answers_a_step_at_once_teaches_the_same(workers, folder, tmp_path, student):
    weights = CLASSIFICATION if student.startswith("bert") else LANGUAGE
    tree = config_tree(folder, student, weights, student_zero=2, teacher_zero=3)
    tree["train"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    path = write(tree, tmp_path / "config.yaml")

    together, one_by_one = (
        workers(2).run("train", path, [f"teacher.micro_batches_per_call={count}"], STEPS)[0]
        for count in (3, 1)
    )

    for ours, theirs in zip(together["losses"], one_by_one["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    for name, weight in together["final"].items():
        torch.testing.assert_close(weight, one_by_one["final"][name], rtol=1e-5, atol=1e-6)
