"""Memory of an engine at each ZeRO stage, the gathers of ZeRO 3, and the peak of the sum."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from megakd.reports import plan_memory as memory
from megakd.reports.plan_memory import Engine, Holding, Ledger, Part, Place, Share
from megakd.reports.plan_tracing import Point, Trace

RANKS = 4
SIZES = (500,) * 8
P = sum(SIZES)
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def engine(zero: dict[str, Any], *, moments: int | None = 2, **options: Any) -> Engine:
    sizes = options.pop("sizes", SIZES)
    facts = {"itemsize": 4, "ranks": RANKS, "is_cpu": False, "learned": sizes, **options}
    zero = {"reduce_bucket_size": 10, **zero}
    return Engine(role="student", sizes=sizes, zero=zero, moments=moments, **facts)


def held(holding: Holding, part: Part, place: Place = "device") -> int:
    share = Share("student", part, place)
    return holding[share] + holding[share._replace(on_heap=True)]


def most(holdings: list[Holding]) -> int:
    """Return the most bytes of the device."""
    return max(
        sum(size for share, size in one.items() if share.place == "device") for one in holdings
    )


def step(engine: Engine) -> list[Holding]:
    """Return what an engine holds during a step."""
    extra = [engine.backward(P, adds=False, last=True), *engine.updating()]
    return [engine.resting() + more for more in extra]


def test_a_second_bucket_is_counted_where_gradients_are_sent_during_the_backward():
    alone, beside = (
        engine({"stage": 2, "reduce_bucket_size": P, "overlap_comm": overlap})
        for overlap in (False, True)
    )
    sent = [held(one.backward(P, adds=False), "gradients") for one in (alone, beside)]
    assert sent[1] - sent[0] == 4 * P


@pytest.mark.parametrize(
    ("stage", "itemsize", "moments", "weights", "optimizer"),
    [
        (0, 4, 2, 4 * P, 8 * P),
        (0, 2, 2, 2 * P, 12 * P),  # the weights in fp32 too
        (1, 4, 2, 4 * P, 12 * P // RANKS),
        (2, 2, 2, 2 * P, 12 * P // RANKS),
        (3, 4, 2, 4 * P // RANKS, 12 * P // RANKS),  # in fp32 a second time
        (3, 2, 2, 2 * P // RANKS, 12 * P // RANKS),
        # SGD keeps no moments: the weights in fp32, at most.
        *((0, 4, 0, 4 * P, 0), (0, 2, 0, 2 * P, 4 * P)),
        *((1, 4, 0, 4 * P, P), (2, 2, 0, 2 * P, P)),
        *((3, 4, 0, P, P), (3, 2, 0, P // 2, P)),
    ],
)
def test_each_stage_shards_what_it_says(stage, itemsize, moments, weights, optimizer):
    resting = engine({"stage": stage}, itemsize=itemsize, moments=moments).resting()
    assert (held(resting, "weights"), held(resting, "optimizer")) == (weights, optimizer)


@pytest.mark.parametrize(("stage", "itemsize"), [(1, 2), (1, 4), (2, 4)])
def test_the_norm_is_planned_for_the_rank_with_the_most_of_it_and_of_gradients(stage, itemsize):
    # The first rank has 900 elements of one weight, and the second all weights, but small parts.
    sizes = (1000, 200, 200, 200, 200)
    norm = engine({"stage": stage}, itemsize=itemsize, ranks=2, sizes=sizes).updating()[0]
    assert held(norm, "gradients") == 1000 * itemsize + 900 * 8


def test_a_full_bucket_of_zero_2_is_copied_before_it_is_sent():
    small = engine({"stage": 2, "reduce_bucket_size": 1000})
    two, three = (held(small.backward(n * 500, adds=False), "gradients") for n in (2, 3))
    assert three - two == 4 * 1000


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_moves_the_optimizer_to_the_host(stage: int):
    here, away = engine({"stage": stage}), engine({"stage": stage, **OFFLOAD})
    assert held(away.resting(), "optimizer") == 0
    assert held(away.resting(), "optimizer", "host") >= 12 * P // RANKS
    assert most(step(away)) < most(step(here))


SENT = 10 + SIZES[0]  # a gradient is larger than the bucket, and is sent directly


@pytest.mark.parametrize(
    ("zero", "itemsize", "done", "adds", "expected"),
    [
        # Whole gradients appear one by one in the first backward only.
        *(({"stage": stage}, 4, P // 2, False, 2 * P) for stage in (0, 1)),
        *(({"stage": stage}, 4, P // 2, True, 4 * P) for stage in (0, 1)),
        ({"stage": 1}, 4, P, False, 4 * P),
        ({"stage": 2}, 4, P, False, 4 * (P // RANKS + SENT)),
        # DeepSpeed's compact buffer: 4 bytes per weight and rank, once, whatever is accumulated.
        *(
            ({"stage": 2, **more}, 2, P, adds, 4 * P // RANKS + 2 * SENT)
            for more in ({}, OFFLOAD)
            for adds in (False, True)
        ),
    ],
)
def test_gradients_are_whole_below_zero_2_and_in_shards_at_zero_2_also_with_offload(
    zero, itemsize, done, adds, expected
):
    backward = engine(zero, itemsize=itemsize).backward(done, adds=adds)
    assert held(backward, "gradients") == expected


def test_offload_of_weights_leaves_none_on_the_device():
    resting = engine({"stage": 3, "offload_param": {"device": "cpu"}}).resting()
    assert held(resting, "weights") == 0
    assert held(resting, "weights", "host") == 4 * P // RANKS


@pytest.mark.parametrize(
    ("stage", "weights", "read"), [(0, P, P + SIZES[-1]), (3, P // RANKS, max(SIZES))]
)
def test_a_frozen_model_has_its_weights_alone_and_a_sharded_one_is_read_a_tensor_at_a_time(
    stage, weights, read
):
    frozen = engine({"stage": stage}, moments=None)
    assert frozen.resting() == {Share("student", "weights"): 4 * weights}
    assert held(frozen.loading(), "weights", "host") == 4 * read


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_frozen_weights_take_their_bytes_once_at_every_zero_stage(stage, itemsize):
    zero = {"stage": stage, "reduce_bucket_size": 1}
    alone, both = (
        engine(zero, itemsize=itemsize, sizes=sizes, learned=(48,)).resting()
        for sizes in ((48,), (4000, 48))
    )

    for part in ("optimizer", "gradients"):
        assert held(both, part) == held(alone, part)
    share = 4000 // RANKS if stage == 3 else 4000
    assert held(both, "weights") - held(alone, "weights") == itemsize * share


# Ten weights of 400 bytes.
ALONE = {"stage": 3, "prefetch_bucket_size": 0, "max_reuse_distance": 0}


def gathered(*, trains: bool, ranks: int, **zero: Any) -> tuple[int, ...]:
    """Return the bytes that are gathered beside activations, and the elements in all."""
    sizes = (100,) * 10
    trace = Trace(sizes, (), sizes, [Point(0, 0, 0)] * (1 + trains))
    frozen = engine({**ALONE, **zero}, moments=None, sizes=sizes, ranks=ranks)
    whole, buffers = frozen.gathered(trace)
    held = whole if frozen.is_gathered_early(trace) else whole + buffers
    return held.total(), frozen.fetched(trace)


PREFETCHED = {"prefetch_bucket_size": 150}


@pytest.mark.parametrize(
    ("limits", "trains", "ranks", "expected"),
    [
        # Without prefetch a weight arrives with its module, in a buffer.
        ({}, False, RANKS, (400 + 400, 1000)),
        # Weights stay until the backward up to a limit, and are gathered again beyond it.
        ({}, True, RANKS, (400 + 400, 2000)),
        ({"stage3_max_reuse_distance": 800}, True, RANKS, (1600 + 400, 1600)),
        ({"max_reuse_distance": 2000}, True, RANKS, (4000 + 400, 1000)),
        # Prefetched weights have a limit of their own.
        ({**PREFETCHED, "max_live_parameters": 300}, True, RANKS, (1200 + 600, 1700)),
        ({**PREFETCHED, "max_live_parameters": 300}, False, RANKS, (1200 + 600, 1000)),
        # All weights are whole before the activations exist, and no buffer is left.
        (PREFETCHED, True, RANKS, (4000, 1000)),
        (PREFETCHED, False, RANKS, (4000, 1000)),
        # A single rank gathers only weights that are on the host.
        ({}, True, 1, (0, 0)),
        ({"offload_param": {"device": "cpu"}}, False, 1, (800, 1000)),
    ],
)
def test_weights_are_gathered_up_to_the_limits_of_zero_3(limits, trains, ranks, expected):
    assert gathered(trains=trains, ranks=ranks, **limits) == expected


WEIGHTS, LIVE = Share("student", "weights"), Share("student", "activations")
SMALL = LIVE._replace(on_heap=True)
MASTERS = Share("student", "optimizer", "host")


def ledger(device: str, process: int, *times: dict[Share, int]) -> Ledger:
    ledger = Ledger(device, process)
    for number, one in enumerate(times):
        ledger.look(str(number), Counter(one))
    return ledger


def test_the_peak_is_the_highest_sum_at_one_time():
    seen = ledger("cuda", 7, {WEIGHTS: 100, LIVE: 20, SMALL: 30}, {WEIGHTS: 120})

    assert seen.peak == (150, "0", {WEIGHTS: 100, LIVE: 50})
    assert seen.most == {WEIGHTS: 120, LIVE: 50}


@pytest.mark.parametrize(("device", "device_and_host"), [("cuda", (100, 37)), ("cpu", (137, 137))])
def test_host_and_device_are_apart_on_a_gpu_and_one_on_a_cpu(monkeypatch, device, device_and_host):
    monkeypatch.setattr(memory, "_HEADROOM", 1.0)
    seen = ledger(device, 7, {WEIGHTS: 100, MASTERS: 30})
    assert (seen.peak.total, seen.host_peak.total) == device_and_host


def test_a_cpu_keeps_small_blocks_with_holes_and_returns_large_ones(monkeypatch):
    monkeypatch.setattr(memory, "_HEADROOM", 1.0)
    # The third time, in memory that stayed with the process.
    seen = ledger("cpu", 0, {SMALL: 50, LIVE: 500}, {}, {SMALL: 50}, {WEIGHTS: 600})

    assert seen.peak.total == 600 + round(50 * 1.4)
