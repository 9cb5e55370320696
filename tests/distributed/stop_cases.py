"""A vote to stop on gloo ranks."""

from __future__ import annotations

import signal
from contextlib import suppress

from unit_counts import counts_of, numbers

from megakd.engine.distributed import ranks
from megakd.engine.stop_vote import StopVote, agreed_signal
from megakd.process import signals


def votes(stopping_rank: int) -> dict:
    """One rank gets SIGUSR1 between two steps: what all of them count and decide."""
    vote, counts = StopVote(), counts_of(3, 2, 1 + ranks().rank)
    decided, summed = [vote.passed()], []
    with suppress(signals.Stopped), signals.watched(), signals.deferred():
        for step in range(3):
            summed.append(numbers(vote.sum_counts(counts)))
            if step == 1 and ranks().rank == stopping_rank:
                signal.raise_signal(signal.SIGUSR1)
            decided.append(vote.passed())
        agreed = agreed_signal()
    return {"decided": decided, "summed": summed, "signal": agreed, "kept": numbers(counts)}
