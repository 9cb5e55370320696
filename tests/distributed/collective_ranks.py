"""Two ranks with a process group of their own; `test_collectives.py` starts them."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from megakd.engine import distributed
from megakd.engine.collectives import (
    activity,
    all_reduce_,
    broadcast,
    gather,
    on_main,
    reports_lost_peer,
)
from megakd.errors import CollectiveTimeoutError, PeerLostError

LIMIT_S = 2.0


def late() -> None:
    """Rank 0 works without telling the others, who wait for it in a sum."""
    if distributed.start(collective_timeout_s=LIMIT_S).is_main:
        time.sleep(2 * LIMIT_S)
        return
    with (
        pytest.raises(CollectiveTimeoutError) as raised,
        reports_lost_peer(),
        activity("training stage student"),
    ):
        all_reduce_(torch.ones(1))
    sys.stdout.write(str(raised.value))


def killed() -> None:
    """A rank is killed while the other waits for it without a limit."""
    ranks = distributed.start()
    gather(0)
    if ranks.rank == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerLostError) as raised, reports_lost_peer(), activity("reading the data"):
        gather(1)
    sys.stdout.write(str(raised.value))
    sys.stdout.flush()
    os._exit(raised.value.exit_code)


def work() -> None:
    """Rank 0 works where the others know that they wait for it."""
    distributed.start(collective_timeout_s=LIMIT_S)
    assert on_main(lambda: time.sleep(1.25 * LIMIT_S) or "done") == "done"
    assert all_reduce_(torch.ones(1)).item() == 2


def accelerators() -> None:
    """The group has no backend for tensors on the CPU, like a group of NCCL alone."""
    dist.init_process_group("cuda:gloo")
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.ones(1))
    rank = dist.get_rank()
    assert all_reduce_(torch.tensor([rank, 1.0], dtype=torch.float64)).tolist() == [1, 2]
    assert all_reduce_(torch.tensor([rank]), largest=True).item() == 1
    assert (broadcast(rank), gather(rank)) == (0, [0, 1])


CASES = {case.__name__: case for case in (late, killed, work, accelerators)}
CASES[sys.argv[1]]()
sys.stdout.flush()
os._exit(0)  # a group after a timeout cannot be left in order
