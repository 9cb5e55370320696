"""The peak of a stage, and the peak of the process."""

from __future__ import annotations

import pytest
import torch

from megakd.engine import memory
from megakd.engine.memory import (
    left_out_of_peak,
    peak_memory_bytes,
    peak_memory_of_process,
    reset_peak_memory,
)

CPU = torch.device("cpu")
LARGE = 400 << 20


def held_for_a_moment(size: int) -> None:
    held = bytearray(size)
    assert held[-1] == 0


@pytest.fixture(autouse=True)
def _own_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_EARLIER", {})
    monkeypatch.setattr(memory, "_COUNTED", {})


def test_a_peak_from_before_the_reset_counts_for_the_process_alone():
    held_for_a_moment(LARGE)
    before = peak_memory_bytes(CPU)

    reset_peak_memory(CPU)

    assert peak_memory_bytes(CPU) < before - LARGE / 2
    assert peak_memory_of_process(CPU) == before


def test_a_peak_after_the_reset_counts_although_the_memory_is_free_again():
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)

    held_for_a_moment(LARGE)

    assert peak_memory_bytes(CPU) > before + LARGE / 2


def test_memory_that_is_left_out_counts_for_the_process_alone():
    reset_peak_memory(CPU)
    held_for_a_moment(LARGE)
    counted = peak_memory_bytes(CPU)

    with left_out_of_peak(CPU):
        held_for_a_moment(2 * LARGE)

    assert peak_memory_bytes(CPU) == counted
    assert peak_memory_of_process(CPU) > counted + LARGE / 2
    reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) < counted - LARGE / 2


def test_without_a_reset_of_the_system_the_peak_of_the_process_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "none")
    held_for_a_moment(LARGE)
    before = peak_memory_bytes(CPU)

    reset_peak_memory(CPU)

    assert peak_memory_bytes(CPU) == before
    assert peak_memory_of_process(CPU) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_of_a_gpu_is_reset_too():
    gpu = torch.device("cuda")
    torch.empty(LARGE, dtype=torch.uint8, device=gpu)
    before = peak_memory_bytes(gpu)

    reset_peak_memory(gpu)

    assert peak_memory_bytes(gpu) <= before - LARGE
    assert peak_memory_of_process(gpu) == before
