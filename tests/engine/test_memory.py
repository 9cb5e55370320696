import gc
import platform
import subprocess
import sys
import weakref

import pytest
import torch

from megakd.engine.memory import earlier_objects_left_alone, forget_models, keep_freed_memory

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


class Engine:
    """Refers to itself, as the hooks of an engine do."""

    def __init__(self):
        self.itself, self.weights = self, torch.ones(1 << 10)


@pytest.fixture
def _no_collection_by_chance():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection_by_chance")
def test_a_model_that_nothing_uses_is_forgotten_and_one_in_use_is_not():
    used, engine = Engine(), Engine()
    left = weakref.ref(engine)
    del engine

    forget_models()

    assert left() is None
    assert used.weights.sum() == 1 << 10


@pytest.mark.usefixtures("_no_collection_by_chance")
def test_what_a_run_leaves_is_collected_when_the_run_ends():
    with earlier_objects_left_alone():
        engine = Engine()
        left = weakref.ref(engine)
        del engine
        assert gc.get_freeze_count() > 0

    assert left() is None
    assert gc.get_freeze_count() == 0


@pytest.mark.skipif(not GLIBC, reason="only glibc can be told to return memory")
def test_the_memory_of_a_forgotten_model_goes_back_to_the_system():
    program = PROGRAM.format(returned=False)
    program += "memory.forget_models()\nprint(resident_mb() - before)\n"

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    kept, left = map(float, done.stdout.split())

    assert kept > 120
    assert left < 40
