"""Terms that are limited to a source, at any ranks, ZeRO stages and cuts of a step."""

from __future__ import annotations

import cases
import pytest
import torch
from equal_runs import STEPS, cut_of

from megakd.training.trainer import Trainer


def train(config_path: str, overrides: list[str], steps: int) -> dict:
    """Train as `cases.train`, on batches that are marked."""
    real = Trainer.train_step

    def marking(self: Trainer, batches):
        return real(self, [marked(batch, self.step) for batch in batches])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", marking)
        return cases.train(config_path, overrides, steps, generates=False)


def marked(batch, step: int):
    """Return rows of either source at step 0, only data at step 1, then texts within rows."""
    ids = batch.inputs["input_ids"]
    if step == 1:
        return batch
    is_rollout = ids.sum(1, keepdim=True) % 2 == 0 if step == 0 else ids % 2 == 0
    return batch.extended(is_rollout=is_rollout.expand(ids.shape).cpu())


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
def trained(distil):
    """Rank 0's findings: `trained(terms, ZeRO stage, cut)`."""

    def of(terms, zero, cut):
        sections = {"objective": terms, "train": cut_of(cut)}
        sections["rollout"] = {"max_new_tokens": 8, "prompt_tokens": 4}
        stages = (zero, zero // 3 * 3)
        case = "test_sources.train"
        return distil("llama-untied", {}, stages, ranks=cut[0], case=case, **sections)[1][0]

    return of


@pytest.fixture(scope="module")
def whole(trained):
    return trained(PAIR, 0, (1, 12, 1))


# Of micro-batches of one row, most have one source at step 0, and another on each rank.
@pytest.mark.parametrize(
    ("zero", "cut"), [(0, (2, 1, 6)), (2, (2, 1, 6)), (3, (2, 1, 6)), (3, (2, 6, 1))]
)
def test_the_pair_of_distillm_2_learns_the_same_in_any_cut(trained, whole, zero, cut):
    result = trained(PAIR, zero, cut)

    assert all(whole["losses"][step][name] > 0 for step in (0, 2) for name in NAMES)
    for step in range(STEPS):
        assert result["losses"][step] == pytest.approx(whole["losses"][step], rel=2e-6, abs=1e-6)
        for name, gradient in whole["gradients"][step].items():
            ours = result["gradients"][step][name]
            torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_step_of_data_is_zero_for_terms_on_rollouts_and_the_run_continues(trained, zero):
    result = trained(ON_ROLLOUTS, zero, (2, 1, 6))

    assert set(result["losses"][1].values()) == {0.0}
    assert not any(gradient.any() for gradient in result["gradients"][1].values())
    for step in (0, 2):
        assert result["losses"][step]["loss"] > 0
        assert all(gradient.any() for gradient in result["gradients"][step].values())
