"""Ranks agree to stop at the same step, whichever of them is told to."""

from __future__ import annotations

import signal

import pytest


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_next_step(workers, rank):
    found = workers(2).run("stop_cases.votes", rank)

    assert [f["decided"] for f in found] == [[False, False, False, True]] * 2
    assert [f["signal"] for f in found] == [signal.SIGUSR1] * 2


def test_the_vote_leaves_the_counts_as_they_are(workers):
    found = workers(2).run("stop_cases.votes", 0)

    assert [f["summed"] for f in found] == [[(6, 4, 3)] * 3] * 2
    assert [f["kept"] for f in found] == [(3, 2, 1), (3, 2, 2)]
