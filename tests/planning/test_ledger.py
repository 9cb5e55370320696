"""What is held at a time, and how the C library of a CPU rank keeps what was freed."""

from __future__ import annotations

from megakd.planning.ledger import HOLES, Holder, Ledger, Share
from megakd.planning.moments import Amount

WEIGHTS, LIVE = Holder("student", "weights"), Holder("student", "activations")


def test_the_peak_is_of_what_was_alive_together() -> None:
    ledger = Ledger("cuda")
    ledger.put(WEIGHTS, Amount(large=100))
    ledger.put(LIVE, Amount(small=50))
    ledger.drop(LIVE)
    ledger.briefly(WEIGHTS, Amount(large=20))

    assert ledger.peaks["device"].total == 150
    assert ledger.peaks["device"].shares == {
        Share("student", "weights", "device"): 100,
        Share("student", "activations", "device"): 50,
    }


def test_host_and_device_are_apart_on_a_gpu_and_one_on_a_cpu() -> None:
    totals = {}
    for device in ("cuda", "cpu"):
        ledger = Ledger(device)
        ledger.put(WEIGHTS, Amount(large=100))
        ledger.put(Holder("student", "optimizer", "host"), Amount(large=30))
        totals[device] = (ledger.peaks["device"].total, ledger.peaks["host"].total)

    assert totals == {"cuda": (100, 30), "cpu": (130, 130)}


def test_a_cpu_keeps_small_blocks_with_holes_and_hands_large_ones_back() -> None:
    ledger = Ledger("cpu")
    ledger.put(LIVE, Amount(small=50, large=500))
    ledger.drop(LIVE)
    ledger.put(WEIGHTS, Amount(large=600))

    assert ledger.peaks["device"].total == 600 + round(50 * (1 + HOLES["step"]))


def test_memory_that_was_kept_serves_the_next_step() -> None:
    ledger = Ledger("cpu")
    for _ in range(3):
        ledger.put(LIVE, Amount(small=50))
        ledger.drop(LIVE)

    assert ledger.peaks["device"].total == round(50 * (1 + HOLES["step"]))


def test_the_moment_of_the_peak_is_named() -> None:
    ledger = Ledger("cuda")
    for when, size in (("a", 1), ("b", 3), ("c", 2)):
        ledger.when = when
        ledger.put(LIVE, Amount(small=size))
        ledger.drop(LIVE)

    assert ledger.peaks["device"].when == "b"
    assert ledger.moments == {"a": 1, "b": 3, "c": 2}
