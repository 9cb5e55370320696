"""Terms that are limited to a source, at any ranks, ZeRO stages and cuts of a step."""

from __future__ import annotations

import pytest
import torch
from equal_runs import STEPS, config_tree, write, write_folder

# DistiLLM-2: skew KL on texts of the data, skew reverse KL on texts of the student.
PAIR = [
    {"loss": "soft_target_skew_kl", "on": "data"},
    {"loss": "soft_target_skew_reverse_kl", "on": "rollouts", "weight": 0.5},
]
ON_ROLLOUTS = [
    {"loss": "soft_target_skew_reverse_kl", "on": "rollouts"},
    {"loss": "hard_cross_entropy", "on": "rollouts", "weight": 0.1},
]
NAMES = ("loss", "soft_target_skew_kl_on_data", "soft_target_skew_reverse_kl_on_rollouts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("sources"))


def trained(workers, folder, path, terms, *, zero=0, cut=(1, 12, 1), student="llama-untied"):
    ranks, rows, micro_batches = cut
    tree = config_tree(folder, student, {}, student_zero=zero, teacher_zero=zero // 3 * 3)
    tree |= {"objective": terms, "rollout": {"max_new_tokens": 8, "prompt_tokens": 4}}
    tree["train"] |= {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": micro_batches,
    }
    run = workers(ranks).run("source_cases.train", write(tree, path / "config.yaml"), [], STEPS)
    return run[0]


def assert_same(found, wanted):
    for step in range(STEPS):
        for name, value in wanted["losses"][step].items():
            assert found["losses"][step][name] == pytest.approx(value, rel=2e-6, abs=1e-6), name
        for name, gradient in wanted["gradients"][step].items():
            torch.testing.assert_close(
                found["gradients"][step][name], gradient, rtol=1e-5, atol=1e-6, msg=name
            )
    for name, weight in wanted["final"].items():
        torch.testing.assert_close(found["final"][name], weight, rtol=0, atol=3e-6, msg=name)


@pytest.fixture(scope="module")
def whole(workers, folder, tmp_path_factory):
    """Whole steps in one micro-batch of one rank."""
    found = trained(workers, folder, tmp_path_factory.mktemp("whole"), PAIR)
    assert all(found["losses"][step][name] > 0 for step in (0, 2) for name in NAMES)
    return found


# Of micro-batches of one row, most have one source at step 0, and another on each rank.
@pytest.mark.parametrize(
    ("zero", "cut"), [(0, (2, 1, 6)), (2, (2, 1, 6)), (3, (2, 1, 6)), (3, (2, 6, 1))]
)
def test_the_pair_of_distillm_2_learns_the_same_in_any_cut(
    workers, folder, tmp_path, whole, zero, cut
):
    assert_same(trained(workers, folder, tmp_path, PAIR, zero=zero, cut=cut), whole)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_step_of_data_is_zero_for_terms_on_rollouts_and_the_run_continues(
    workers, folder, tmp_path, zero
):
    found = trained(workers, folder, tmp_path, ON_ROLLOUTS, zero=zero, cut=(2, 1, 6))

    assert set(found["losses"][1].values()) == {0.0}
    assert not any(gradient.any() for gradient in found["gradients"][1].values())
    for step in (0, 2):
        assert found["losses"][step]["loss"] > 0
        assert all(gradient.any() for gradient in found["gradients"][step].values())
