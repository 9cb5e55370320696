"""What ZeRO 3 holds gathered: DeepSpeed's rules of fetching, reusing and letting go."""

from __future__ import annotations

from typing import Any

from megakd.planning.gathering import Gathering, gathering_of, persistent
from megakd.planning.moments import Inventory, Moment, Parameter, Trace

SIZES = (100, 100, 100, 100)
PARAMETERS = Inventory(Parameter(n, decays=True) for n in SIZES)
ALONE = {"param_persistence_threshold": 0, "prefetch_bucket_size": 0, "max_reuse_distance": 0}


def played(order: tuple[int, ...], zero: dict[str, Any]) -> Gathering:
    moments = [Moment(f"m{n}", {n}) for n in order]
    trace = Trace(PARAMETERS, moments, turn=len(moments), flops=0.0)
    return gathering_of(trace, zero, itemsize=4, in_place=True)


def kept(gathering: Gathering) -> list[int]:
    return [moment.kept.total for moment in gathering.moments]


def test_only_the_module_at_work_is_whole_without_prefetch_and_reuse() -> None:
    gathering = played((0, 1, 2, 3, 3, 2, 1, 0), ALONE)

    assert kept(gathering) == [400] * 8
    assert gathering.numel == 8 * 100


def test_what_comes_again_within_the_reuse_distance_stays() -> None:
    gathering = played((0, 1, 2, 3, 3, 2, 1, 0), {**ALONE, "max_reuse_distance": 10**9})

    assert kept(gathering) == [400, 800, 1200, 1600, 1600, 1200, 800, 400]
    assert gathering.numel == 4 * 100


def test_a_short_reuse_distance_keeps_what_comes_soon() -> None:
    gathering = played((0, 1, 2, 3, 3, 2, 1, 0), {**ALONE, "max_reuse_distance": 250})

    assert max(kept(gathering)) == 800
    assert gathering.numel == 6 * 100


def test_what_comes_next_is_fetched_ahead_up_to_the_bucket() -> None:
    gathering = played((0, 1, 2, 3), {**ALONE, "prefetch_bucket_size": 150})

    assert kept(gathering) == [3 * 400, 3 * 400, 2 * 400, 400]
    assert [moment.arriving.total for moment in gathering.moments] == [3 * 400, 0, 0, 0]
    assert gathering.numel == 4 * 100


def test_every_module_fetches_another_bucket_until_the_limit_of_live_weights() -> None:
    limited = {**ALONE, "prefetch_bucket_size": 100, "max_live_parameters": 300}
    order = (0, 0, 0, 0, 1, 2, 3)

    assert kept(played(order, limited)) == [800, 1200, 1200, 1200, 1200, 800, 400]


def test_no_more_is_fetched_ahead_than_may_be_alive() -> None:
    limited = {**ALONE, "prefetch_bucket_size": 10**9, "max_live_parameters": 200}

    assert max(kept(played((0, 1, 2, 3), limited))) <= 2 * 400 + 400


def test_small_parameters_stay_whole() -> None:
    assert persistent(PARAMETERS, {"stage3_param_persistence_threshold": 100}) == {0, 1, 2, 3}
    assert persistent(PARAMETERS, {"param_persistence_threshold": 99}) == set()
    limited = {"param_persistence_threshold": 100, "model_persistence_threshold": 250}
    assert len(persistent(PARAMETERS, limited)) == 2
