"""Peaks of what is held together, and what the C library of a CPU rank keeps of freed memory."""

from __future__ import annotations

from megakd.planning.ledger import HOLES, Ledger, Share, together
from megakd.planning.moments import Amount

WEIGHTS, LIVE = Share("student", "weights"), Share("student", "activations")
MASTERS = Share("student", "optimizer", "host")


def test_holdings_of_one_kind_are_added() -> None:
    held = together({WEIGHTS: Amount(1, 2)}, {WEIGHTS: Amount(10, 20), LIVE: Amount(5)}, {})

    assert held == {WEIGHTS: Amount(11, 22), LIVE: Amount(5)}


def test_the_peak_is_the_highest_sum_at_one_time() -> None:
    ledger = Ledger("cuda")
    ledger.look("a", {WEIGHTS: Amount(large=100)}, {LIVE: Amount(small=50)})
    ledger.look("b", {WEIGHTS: Amount(large=120)})

    assert ledger.peaks["device"].total == 150
    assert ledger.peaks["device"].shares == {WEIGHTS: 100, LIVE: 50}
    assert ledger.most == {WEIGHTS: 120, LIVE: 50}


def test_host_and_device_are_apart_on_a_gpu_and_one_on_a_cpu() -> None:
    totals = {}
    for device in ("cuda", "cpu"):
        ledger = Ledger(device)
        ledger.look("", {WEIGHTS: Amount(large=100), MASTERS: Amount(large=30)})
        totals[device] = (ledger.peaks["device"].total, ledger.peaks["host"].total)

    assert totals == {"cuda": (100, 30), "cpu": (130, 130)}


def test_a_cpu_keeps_small_blocks_with_holes_and_hands_large_ones_back() -> None:
    ledger = Ledger("cpu")
    ledger.look("", {LIVE: Amount(small=50, large=500)})
    ledger.look("", {WEIGHTS: Amount(large=600)})

    assert ledger.peaks["device"].total == 600 + round(50 * (1 + HOLES["step"]))


def test_memory_that_was_kept_serves_the_next_step() -> None:
    ledger = Ledger("cpu")
    for _ in range(3):
        ledger.look("", {LIVE: Amount(small=50)})
        ledger.look("", {})

    assert ledger.peaks["device"].total == round(50 * (1 + HOLES["step"]))


def test_the_moment_of_the_peak_is_named() -> None:
    ledger = Ledger("cuda")
    for when, size in (("a", 1), ("b", 3), ("c", 2)):
        ledger.look(when, {LIVE: Amount(small=size)})

    assert ledger.peaks["device"].when == "b"
