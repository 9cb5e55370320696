"""Losses by source and by class, early stopping and stop signals under several ranks."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

import cases
import pytest
import torch
from equal_runs import CLASSIFICATION, CUTS, STEPS, cut_of
from slow_cases import slow
from unit_counts import counts_of, numbers
from whole_run import read

from megakd.engine.distributed import ranks
from megakd.process import signals
from megakd.training.stage_run import StepVotes, agreed_signal
from megakd.training.trainer import Trainer


def votes(stopping_rank: int) -> dict:
    """One rank gets SIGUSR1 between two steps: what all of them count and decide."""
    vote = StepVotes({"never": lambda: False, "stop": lambda: signals.requested() > 0})
    counts = counts_of(3, 2, 1 + ranks().rank)
    decided, summed = [vote.any("stop")], []
    with suppress(signals.Stopped), signals.watched(), signals.deferred():
        for step in range(3):
            summed.append(numbers(vote.sum_counts(counts)))
            if step == 1 and ranks().rank == stopping_rank:
                signal.raise_signal(signal.SIGUSR1)
            decided.append(vote.any("stop"))
            assert not vote.any("never")
        agreed = agreed_signal()
    return {"decided": decided, "summed": summed, "signal": agreed, "kept": numbers(counts)}


def train_marked(config_path: str, overrides: list[str], steps: int) -> dict:
    """Train as `cases.train`, on batches that are marked."""
    real = Trainer.train_step

    def marking(self: Trainer, batches):
        return real(self, [marked(batch, self.step) for batch in batches])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", marking)
        return cases.train(config_path, overrides, steps)


def marked(batch, step: int):
    """Return data at step 1, and generated texts at other steps."""
    return batch._replace(is_rollout=step != 1)


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
def by_source(distil):
    """Rank 0's findings: `by_source(terms, ZeRO stage, cut)`."""

    def of(terms, zero, cut):
        sections = {"objective": terms, "train": cut_of(cut)}
        mix = 0.5 if terms is PAIR else 1.0
        # Texts of a teacher may have labels.
        texts = {"max_new_tokens": 8, "prompt_tokens": 4, "mix": mix, "by": "teacher"}
        sections["rollout"] = texts
        stages = (zero, zero // 3 * 3)
        case = "test_training_habits.train_marked"
        return distil("llama-untied", {}, stages, ranks=cut[0], case=case, **sections)[1][0]

    return of


def assert_same(run, whole):
    for step in range(STEPS):
        assert run["losses"][step] == pytest.approx(whole["losses"][step], rel=2e-6, abs=1e-6)
    torch.testing.assert_close(run["gradients"], whole["gradients"], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def whole(by_source):
    return by_source(PAIR, 0, (1, 12, 1))


SLOW = [(0, (2, 1, 6)), (2, (2, 1, 6)), (3, (2, 6, 1))]


@pytest.mark.parametrize(("zero", "cut"), [(3, (2, 1, 6)), *slow(*SLOW)])
def test_the_pair_of_distillm_2_learns_the_same_in_any_cut(by_source, whole, zero, cut):
    on_data, on_rollouts = ([step[name] > 0 for step in whole["losses"][:3]] for name in NAMES[1:])
    assert (on_data, on_rollouts) == ([False, True, False], [True, False, True])
    assert_same(by_source(PAIR, zero, cut), whole)


@pytest.mark.parametrize("zero", [*slow(0), 3])
def test_a_step_of_data_is_zero_for_terms_on_rollouts_and_the_run_continues(by_source, zero):
    result = by_source(ON_ROLLOUTS, zero, (2, 1, 6))

    assert set(result["losses"][1].values()) == {0.0}
    assert not any(gradient.any() for gradient in result["gradients"][1].values())
    for step in (0, 2):
        assert result["losses"][step]["loss"] > 0
        assert all(gradient.any() for gradient in result["gradients"][step].values())


HARD = {"loss": "hard_cross_entropy", "class_weights": "balanced", "label_smoothing": 0.1}
OVER_ROWS = {"loss": "hard_cross_entropy", "count": "rows"}


@pytest.fixture
def trained(distil):
    def train(cut, term):
        terms = [term, {"loss": "soft_target_kl"}]
        train = {"objective": terms, "train": cut_of(cut)}
        return distil("bert-student", {}, (2, 0), ranks=cut[0], **train)[1][0]

    return train


@pytest.mark.parametrize(
    "term", [*slow(HARD), OVER_ROWS], ids=["weights and smoothing", "all rows"]
)
def test_options_of_the_loss_on_labels_weigh_alike_in_every_cut(trained, term):
    whole, *others = (trained(cut, term) for cut in (CUTS[0], CUTS[3], CUTS[5]))

    for run in others:
        assert_same(run, whole)
    plain = trained(CUTS[0], {"loss": "hard_cross_entropy"})
    assert plain["losses"][0] != pytest.approx(whole["losses"][0], rel=1e-3)


@pytest.mark.slow
def test_all_ranks_stop_early_at_the_same_step(command, write_run):
    # The first evaluation sets the score, and without learning no later one is better.
    stopping = {"early_stopping_patience": 2, "learning_rate": 0.0, "max_steps": 8}
    sections = {"train": stopping, "eval": {"eval_steps": 1}}

    path = write_run("bert-student", CLASSIFICATION, (3, 3), **sections)

    command("--config", path, code=0)

    assert [stage["steps"] for stage in read(Path(f"{path}-out"))["stages"]] == [3]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_next_step(workers, rank):
    votes = workers(2).run("test_training_habits.votes", rank)

    assert [vote["decided"] for vote in votes] == [[False, False, False, True]] * 2
    assert [vote["signal"] for vote in votes] == [signal.SIGUSR1] * 2
    # The vote leaves the counts as they are.
    assert [vote["summed"] for vote in votes] == [[(6, 4, 3)] * 3] * 2
    assert [vote["kept"] for vote in votes] == [(3, 2, 1), (3, 2, 2)]
