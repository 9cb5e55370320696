"""Three ranks of which the last is lost; `test_lost_ranks.py` starts them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import deepspeed

from megakd.engine import distributed, peers
from megakd.engine.collectives import gather
from megakd.engine.distributed import Ranks
from megakd.errors import PeerLostError

peers.LEAST_SILENCE_S = 2.0
peers.GRACE_S = 1.0
LONG_S = 120.0
LOST = 2


TOLD: list[bytes] = []
tell = peers._PeerWatch._tell


def noting(self: peers._PeerWatch, line: bytes) -> None:
    TOLD.append(line)
    tell(self, line)


peers._PeerWatch._tell = noting


def work(ranks: Ranks) -> None:
    """The others work without a collective, while the last rank is killed."""
    if ranks.rank == LOST:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LONG_S)


def stopped(ranks: Ranks) -> None:
    """The last rank is stopped, as a machine without memory may stop it."""
    if ranks.rank == LOST:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(LONG_S)


def waiting(ranks: Ranks) -> None:
    """The others wait for the last rank, which fails."""
    if ranks.rank == LOST:
        raise ValueError("rank 2 cannot go on")
    gather(ranks.rank)


def forked(ranks: Ranks) -> None:
    """A child of the last rank lives longer than the rank."""
    if ranks.rank == LOST and os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10 if ranks.rank == LOST else LONG_S)


def ended(ranks: Ranks) -> None:
    """Rank 0 is the last to end, no rank is lost, and a rank gives a sign of life a second."""
    time.sleep(2.5 if ranks.is_main else 1.5)
    assert 1 <= len(TOLD) <= 4


def stopping(call: Callable) -> Callable:
    """The last rank is stopped before the call."""

    def stop(*arguments, **options):
        if os.environ["RANK"] == str(LOST):
            os.kill(os.getpid(), signal.SIGSTOP)
        return call(*arguments, **options)

    return stop


leave = os._exit


def leave_late(code: int) -> NoReturn:
    """End after the others, who would lose the store of rank 0 before they say why they end."""
    time.sleep(0.5)
    leave(code)


if sys.argv[1] in ("joined", "unwatched"):
    peers.MEETINGS = 1.25  # the limit of these two alone
    if os.environ["RANK"] == "0":
        os._exit = leave_late
if sys.argv[1] == "absent":
    distributed.rendezvous = stopping(distributed.rendezvous)
if sys.argv[1] == "joined":
    deepspeed.init_distributed = stopping(deepspeed.init_distributed)
if sys.argv[1] == "unwatched":
    peers._connect = stopping(peers._connect)
CASES = {case.__name__: case for case in (work, stopped, waiting, forked, ended)}
ranks = distributed.start(collective_timeout_s=6.0 if sys.argv[1] == "absent" else 600.0)
code = 0
try:
    with peers.watched(2.0), peers.reports_lost_peer():
        CASES.get(sys.argv[1], work)(ranks)
except PeerLostError as error:
    sys.stderr.write(f"megakd: {error}\n")
    code = error.exit_code
except ValueError:
    code = 3
sys.stderr.flush()
os._exit(code)
