import platform
import subprocess
import sys

import pytest

from megakd.engine.memory import keep_freed_memory

GLIBC = platform.libc_ver()[0] == "glibc"
# The heap of a new process: 40 tensors of 4 MB are made and freed, below one that stays.
PROGRAM = """
import ctypes, torch
from megakd.engine import memory

def resident_mb():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096 / 1e6

def make_and_free():
    made = [torch.ones(1 << 20) for _ in range(40)]
    stays = torch.ones(1 << 10)
    del made
    return stays

memory.keep_freed_memory()
before = resident_mb()
if {returned}:
    with memory.freed_memory_returned():
        stays = make_and_free()
        print(resident_mb() - before)
else:
    stays = make_and_free()
    print(resident_mb() - before)
"""


def megabytes_left(*, returned):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(returned=returned)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def test_the_allocator_takes_the_setting_where_it_is_glibc():
    assert keep_freed_memory() == GLIBC


@pytest.mark.skipif(not GLIBC, reason="only glibc has these settings")
def test_freed_tensors_go_back_while_a_model_loads_and_stay_afterwards():
    assert megabytes_left(returned=True) < 40
    assert megabytes_left(returned=False) > 120
