"""A rank that fails tells why and ends, also where its process group can never be left."""

from __future__ import annotations

import os

import pytest
from forked_ranks import start_rank

# As NCCL's while another rank waits in a collective: leaving the group waits for ever.
SCRIPT = """
import sys, time
import torch.distributed as dist
from megakd import cli
from megakd.engine import distributed
from megakd.errors import MegakdError

class Waiting(dist.ProcessGroup):
    def getBackendName(self):
        return "waiting"
    def shutdown(self):
        time.sleep(3600)

def join(store, rank, size, timeout):
    return Waiting(rank, size)

dist.Backend.register_backend("waiting", join, devices=["cpu"])
dist.init_process_group("waiting", rank=0, world_size=1, store=dist.HashStore())

def command():
    try:
        raise {error}
    except Exception as error:
        distributed.stop(failure=error)
        raise

def call():
    distributed.keep_group()
    raise {error}

{how}
"""


@pytest.mark.parametrize(
    ("how", "error", "code", "told"),
    [
        ("sys.exit(cli._guarded(command))", "MegakdError('of the user')", 2, "error: of the user"),
        ("call()", "RuntimeError('CUDA')", 1, "RuntimeError: CUDA"),
    ],
    ids=["command", "python"],
)
def test_a_failed_rank_ends_without_waiting_for_the_others(tmp_path, how, error, code, told):
    program, log = tmp_path / "rank.py", tmp_path / "log"
    program.write_text(SCRIPT.format(error=error, how=how))

    rank = start_rank([str(program)], variables=os.environ, log=log)
    rank.join(timeout=240)

    assert rank.exitcode == code
    assert told in log.read_text()
