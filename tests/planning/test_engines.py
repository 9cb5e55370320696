"""What an engine holds at each ZeRO stage: the ZeRO paper's identities, and DeepSpeed's own."""

from __future__ import annotations

from typing import Any

import pytest

from megakd.planning.cluster import Cluster
from megakd.planning.engines import Setting, engine_of
from megakd.planning.ledger import Holder, Ledger, Part, Place
from megakd.planning.moments import Inventory, Parameter
from megakd.planning.sharded import learner_of

RANKS = 4
SIZES = (500,) * 8
P = sum(SIZES)


def inventory(sizes: tuple[int, ...] = SIZES) -> Inventory:
    return Inventory(tuple(Parameter(f"p{n}", n, decays=True) for n in sizes))


def setting(
    zero: dict[str, Any], *, itemsize: int = 4, ranks: int = RANKS, moments: int = 2
) -> Setting:
    return Setting(
        role="student",
        inventory=inventory(),
        zero={"reduce_bucket_size": 10, **zero},
        itemsize=itemsize,
        cluster=Cluster(ranks=ranks, device="cuda"),
        ledger=Ledger("cuda"),
        moments=moments,
    )


def trained(zero: dict[str, Any], **options: int) -> Ledger:
    """After one whole step."""
    at = setting(zero, **options)
    engine = learner_of(at)
    engine.load()
    engine.initialize()
    engine.begin_backward(first=True)
    engine.finish(range(len(SIZES)))
    engine.end_backward(last=True)
    engine.update()
    return at.ledger


def held(ledger: Ledger, part: Part, place: Place = "device") -> int:
    buffers = ("", "moments", "largest", "bucket", "flat", "sent", "scratch", "whole")
    return sum(ledger.of(Holder("student", part, place, name)).total for name in buffers)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_shards_of_all_ranks_are_the_whole_and_padding(ranks: int) -> None:
    shards = ranks * inventory().sharded(ranks, 4).total

    assert 4 * P <= shards < 4 * (P + ranks * len(SIZES))


def test_zero_0_keeps_weights_and_both_moments_whole() -> None:
    ledger = trained({"stage": 0})

    assert held(ledger, "weights") == 4 * P
    assert held(ledger, "optimizer") == 8 * P


def test_zero_0_in_bf16_keeps_weights_in_fp32_too() -> None:
    ledger = trained({"stage": 0}, itemsize=2)

    assert held(ledger, "weights") == 2 * P
    assert held(ledger, "optimizer") == 12 * P


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_zero_1_and_2_shard_all_but_the_weights(stage: int, itemsize: int) -> None:
    ledger = trained({"stage": stage}, itemsize=itemsize)

    assert held(ledger, "weights") == itemsize * P
    assert held(ledger, "optimizer") == 12 * P // RANKS


@pytest.mark.parametrize(("itemsize", "moments"), [(4, 8), (2, 12)])
def test_zero_3_shards_everything(itemsize: int, moments: int) -> None:
    ledger = trained({"stage": 3}, itemsize=itemsize)

    assert held(ledger, "weights") == itemsize * P // RANKS
    assert held(ledger, "optimizer") == moments * P // RANKS


@pytest.mark.parametrize(
    ("stage", "itemsize", "kept"),
    [(0, 4, 0), (0, 2, 4 * P), (1, 4, P), (2, 2, P), (3, 4, 0), (3, 2, P)],
)
def test_sgd_keeps_no_moments(stage: int, itemsize: int, kept: int) -> None:
    ledger = trained({"stage": stage}, itemsize=itemsize, moments=0)

    assert held(ledger, "optimizer") == kept  # the weights in fp32, at most


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sgd_takes_less_at_its_peak(stage: int) -> None:
    adamw, sgd = (
        trained({"stage": stage}, itemsize=2, moments=moments).peaks["device"].total
        for moments in (2, 0)
    )

    assert sgd < adamw


def test_gradients_are_whole_at_zero_1_and_in_shards_at_zero_2() -> None:
    after: dict[int, int] = {}
    for stage in (1, 2):
        at = setting({"stage": stage})
        engine = learner_of(at)
        engine.load()
        engine.initialize()
        engine.begin_backward(first=True)
        engine.finish(range(len(SIZES)))
        after[stage] = (
            held(at.ledger, "gradients")
            - at.ledger.of(Holder("student", "gradients", "device", "bucket")).total
        )

    assert after[1] == 4 * P
    assert after[2] == 4 * P // RANKS


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_moves_the_optimizer_to_the_host(stage: int) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}

    here, away = trained({"stage": stage}), trained({"stage": stage, **offload})

    assert held(away, "optimizer") == 0
    assert held(away, "optimizer", "host") >= 12 * P // RANKS
    assert away.peaks["device"].total < here.peaks["device"].total


def test_offload_of_weights_leaves_none_on_the_device() -> None:
    ledger = trained({"stage": 3, "offload_param": {"device": "cpu"}})

    assert held(ledger, "weights") == 0
    assert held(ledger, "weights", "host") == 4 * P // RANKS


def test_a_frozen_model_has_its_weights_and_nothing_else() -> None:
    for zero, expected in (({"stage": 0}, 4 * P), ({"stage": 3}, 4 * P // RANKS)):
        at = setting(zero)
        engine_of(at).load()

        assert held(at.ledger, "weights") == expected
        assert held(at.ledger, "optimizer") == held(at.ledger, "gradients") == 0


def test_a_whole_model_is_read_on_the_host_and_a_sharded_one_a_tensor_at_a_time() -> None:
    whole, shards = setting({"stage": 0}), setting({"stage": 3})
    engine_of(whole).load()
    engine_of(shards).load()

    assert whole.ledger.peaks["host"].total >= 4 * P
    assert shards.ledger.peaks["host"].total == 4 * max(SIZES)
