"""Statistics of the texts that a student learns from."""

from __future__ import annotations

import pytest

from megakd.contract.completions import Completion, Rollout
from megakd.rollouts.batches import RolloutStatistics


def text(*ids: int, finished: bool = True, version: int = 5) -> Rollout:
    return Rollout(0, (9,), Completion(ids, finished), version, seed=0)


def test_the_share_of_distinct_pairs_does_not_depend_on_the_number_of_texts() -> None:
    """A pair that two texts have in common is no repetition within a text."""
    few, many = RolloutStatistics(), RolloutStatistics()
    few.add([text(1, 2, 3), text(1, 1, 1)], 5)
    many.add([text(1, 2, 3), text(1, 1, 1)] * 10, 5)

    assert few.scalars()["rollout/distinct_2"] == pytest.approx((1 + 0.5) / 2)
    assert many.scalars()["rollout/distinct_2"] == pytest.approx((1 + 0.5) / 2)


def test_means_are_over_the_texts() -> None:
    found = RolloutStatistics()
    found.add([text(1, 2, 3, version=4), text(1, finished=False)], 6)

    values = found.scalars()

    assert values["rollout/tokens_per_text"] == 2
    assert values["rollout/truncated"] == 0.5
    assert values["rollout/staleness"] == 1.5
    assert RolloutStatistics().scalars() == {}
