"""What models leave in memory, and the peaks of a stage and of the process."""

import gc
import platform
import subprocess
import sys
import weakref

import pytest
import torch

from megakd.engine import memory
from megakd.engine.memory import (
    earlier_objects_left_alone,
    forget_models,
    left_out_of_peak,
    peak_memory_bytes,
    peak_memory_of_process,
    reset_peak_memory,
)

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
with memory.freed_memory_returned():
    stays = make_and_free()
    print(resident_mb() - before)
del stays
before = resident_mb()
stays = make_and_free()
print(resident_mb() - before)
memory.forget_models()
print(resident_mb() - before)
"""


@pytest.mark.skipif(not GLIBC, reason="only glibc has these settings")
def test_freed_tensors_go_back_while_a_model_loads_and_when_a_model_is_forgotten():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    while_loading, afterwards, forgotten = map(float, done.stdout.split())

    assert while_loading < 40
    assert afterwards > 120
    assert forgotten < 40


class Engine:
    """Refers to itself, as the hooks of an engine do."""

    def __init__(self):
        self.itself, self.weights = self, torch.ones(1 << 10)


@pytest.fixture
def _no_collection_by_chance():
    gc.disable()
    yield
    gc.freeze()  # as before the test: the end of a run unfreezes all modules of this process
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


CPU = torch.device("cpu")
LARGE = 100 << 20


def held_for_a_moment(size: int) -> None:
    held = bytearray(size)
    assert held[-1] == 0


@pytest.fixture(autouse=True)
def _own_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_EARLIER", {})
    monkeypatch.setattr(memory, "_COUNTED", {})


@pytest.mark.parametrize("is_reset", [True, False], ids=["reset", "no reset of the system"])
def test_a_peak_from_before_the_reset_counts_for_the_process_alone(tmp_path, monkeypatch, is_reset):
    if not is_reset:
        monkeypatch.setattr(memory, "PROCESS", tmp_path / "none")
    held_for_a_moment(LARGE)
    before = peak_memory_bytes(CPU)

    reset_peak_memory(CPU)

    assert (peak_memory_bytes(CPU) < before - LARGE / 2) is is_reset
    assert is_reset or peak_memory_bytes(CPU) == before
    assert peak_memory_of_process(CPU) == before


def test_a_peak_after_the_reset_counts_and_memory_that_is_left_out_for_the_process_alone():
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    held_for_a_moment(LARGE)
    counted = peak_memory_bytes(CPU)
    assert counted > before + LARGE / 2  # although the memory is free again

    with left_out_of_peak(CPU):
        held_for_a_moment(2 * LARGE)

    assert peak_memory_bytes(CPU) == counted
    assert peak_memory_of_process(CPU) > counted + LARGE / 2
    reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) < counted - LARGE / 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_of_a_gpu_is_reset_too():
    gpu = torch.device("cuda")
    torch.empty(LARGE, dtype=torch.uint8, device=gpu)
    before = peak_memory_bytes(gpu)

    reset_peak_memory(gpu)

    assert peak_memory_bytes(gpu) <= before - LARGE
    assert peak_memory_of_process(gpu) == before
