"""Class weights, early stopping and stop signals under several ranks."""

from __future__ import annotations

import signal
from contextlib import suppress

import pytest
import torch
from equal_runs import CLASSIFICATION, CUTS, STEPS, cut_of
from unit_counts import counts_of, numbers

from megakd.engine.distributed import ranks
from megakd.process import signals
from megakd.training.stage_run import StepVotes, agreed_signal


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


HARD = {"loss": "hard_cross_entropy", "class_weights": "balanced", "label_smoothing": 0.1}


OVER_ROWS = {"loss": "hard_cross_entropy", "count": "rows"}


@pytest.fixture
def trained(distil):
    def train(cut, term):
        terms = [term, {"loss": "soft_target_kl"}]
        train = {"objective": terms, "train": cut_of(cut)}
        return distil("bert-student", {}, (2, 0), ranks=cut[0], **train)[1][0]

    return train


@pytest.mark.parametrize("term", [HARD, OVER_ROWS], ids=["weights and smoothing", "all rows"])
def test_options_of_the_loss_on_labels_weigh_alike_in_every_cut(trained, term):
    whole, *others = (trained(cut, term) for cut in (CUTS[0], CUTS[3], CUTS[5]))

    for run in others:
        for step in range(STEPS):
            assert run["losses"][step] == pytest.approx(whole["losses"][step], rel=2e-6, abs=1e-6)
            for name, gradient in whole["gradients"][step].items():
                assert torch.allclose(run["gradients"][step][name], gradient, atol=1e-6), name
    plain = trained(CUTS[0], {"loss": "hard_cross_entropy"})
    assert plain["losses"][0] != pytest.approx(whole["losses"][0], rel=1e-3)


def test_all_ranks_stop_early_at_the_same_step(workers, write_run):
    # The first evaluation sets the score, and no later one can be so much better.
    stopping = {"early_stopping_patience": 2, "early_stopping_threshold": 1e9, "max_steps": 8}
    sections = {"train": stopping, "eval": {"eval_steps": 1}}

    path = write_run("bert-student", CLASSIFICATION, (3, 3), **sections)

    assert workers(2).run("steps_taken", path) == [3, 3]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_next_step(workers, rank):
    votes = workers(2).run("test_training_habits.votes", rank)

    assert [vote["decided"] for vote in votes] == [[False, False, False, True]] * 2
    assert [vote["signal"] for vote in votes] == [signal.SIGUSR1] * 2
    # The vote leaves the counts as they are.
    assert [vote["summed"] for vote in votes] == [[(6, 4, 3)] * 3] * 2
    assert [vote["kept"] for vote in votes] == [(3, 2, 1), (3, 2, 2)]
