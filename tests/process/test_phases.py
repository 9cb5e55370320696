"""Phases of a run: every second is in one phase."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megakd.process import phases
from megakd.process.phases import counted, phase, seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(value=100.0)
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: now.value))
    return now


def test_a_phase_inside_another_takes_its_time_out_of_that_one(clock):
    with counted(since_s=9.0):
        clock.value += 1
        with phase("training"):
            clock.value += 2
            with phase("models"):
                clock.value += 4
            clock.value += 8
        clock.value += 16
        result = seconds()

    assert result == {"start": 10.0, "training": 10.0, "models": 4.0, "other": 16.0}


def test_a_phase_that_fails_ends(clock):
    @phase("data")
    def fail() -> None:
        clock.value += 1
        raise ValueError("no")

    with counted():
        with pytest.raises(ValueError, match="no"):
            fail()
        clock.value += 2

        assert seconds() == {"data": 1.0, "other": 2.0}


def test_a_function_can_be_a_phase_and_nothing_is_counted_outside_a_run(clock):
    @phase("models")
    def load() -> None:
        clock.value += 3

    load()
    assert seconds() == {}
    with counted():
        load()
        load()

        assert seconds() == {"models": 6.0}
