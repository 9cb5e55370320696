"""Class weights and early stopping under several ranks."""

from __future__ import annotations

import pytest
import torch
from equal_runs import CLASSIFICATION, CUTS, STEPS, config_tree, write, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("equivalence"))


def test_class_weights_and_label_smoothing_weigh_alike_in_every_cut(workers, folder, tmp_path):
    found = []
    for ranks, size, accumulation in (CUTS[0], CUTS[3], CUTS[5]):
        tree = config_tree(folder, "bert-student", CLASSIFICATION, student_zero=2, teacher_zero=0)
        tree["objective"][0] |= {"class_weights": "balanced", "label_smoothing": 0.1}
        tree["train"] |= {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
        }
        path = write(tree, tmp_path / f"config-{ranks}-{size}.yaml")
        found.append(workers(ranks).run("train", path, [], STEPS)[0])

    whole, *cut = found
    for run in cut:
        for step in range(STEPS):
            assert run["losses"][step] == pytest.approx(whole["losses"][step], rel=2e-6, abs=1e-6)
            for name, gradient in whole["gradients"][step].items():
                assert torch.allclose(run["gradients"][step][name], gradient, atol=1e-6), name
    plain = config_tree(folder, "bert-student", CLASSIFICATION, student_zero=2, teacher_zero=0)
    unweighted = workers(1).run("train", write(plain, tmp_path / "plain.yaml"), [], 1)[0]
    assert unweighted["losses"][0] != pytest.approx(whole["losses"][0], rel=1e-3)


def test_all_ranks_stop_early_at_the_same_step(workers, folder, tmp_path):
    tree = config_tree(folder, "bert-student", CLASSIFICATION, student_zero=3, teacher_zero=3)
    # The first evaluation sets the score, and no later one can be so much better.
    stopping = {"early_stopping_patience": 2, "early_stopping_threshold": 1e9, "max_steps": 8}
    tree["train"] |= stopping
    tree["eval"] = {"eval_steps": 1}
    tree["output_dir"] = str(tmp_path / "run")

    steps = workers(2).run("steps_taken", write(tree, tmp_path / "config.yaml"))

    assert steps == [3, 3]
