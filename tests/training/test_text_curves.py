"""Curves by position: the buckets of positions, and the means over micro-batches."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megakd.contract.batch import IGNORE, Batch, LossInputs
from megakd.contract.stage import Pass
from megakd.rollouts import text_evaluation as evaluation
from megakd.rollouts.text_evaluation import (
    BUCKETS,
    TextCurves,
    bucket_ends,
    bucket_names,
    by_position,
)

FIRST, SECOND = [IGNORE, 5, 5, 5, IGNORE], [5, 5, 5, 5, 5]


@pytest.fixture(autouse=True)
def one_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "all_reduce_", lambda tensor: tensor)


@pytest.fixture
def positions_as_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of a group are those of the positions in the row; a teacher is not there."""

    def sums(reading: LossInputs, groups: torch.Tensor, count: int) -> torch.Tensor:
        columns = torch.arange(groups.shape[1]).expand_as(groups).double()
        found = torch.full((count, 4), torch.nan, dtype=torch.float64)
        for number in range(count):
            mine = groups == number
            found[number, :2] = torch.stack([mine.sum().double(), (columns * mine).sum()])
        return found

    monkeypatch.setattr(evaluation, "sums_by_group", sums)


def watched(curves: TextCurves, *rows: list[int], plan: tuple[Pass, ...] = (Pass(),)) -> Any:
    labels = torch.tensor(rows)
    batch = Batch({}, labels, labels != IGNORE)
    reading: Any = LossInputs(student=None, teacher=None, batch=batch, weights={}, per_unit={})  # type: ignore[arg-type]
    return curves.watching(plan)[0].weigh(reading)  # type: ignore[misc]


@given(st.integers(1, 100_000))
def test_every_position_is_in_one_bucket_and_buckets_grow(longest: int) -> None:
    ends = bucket_ends(longest)

    sizes = [end - start for start, end in zip((0, *ends[:-1]), ends, strict=True)]
    assert ends[-1] == longest
    assert len(ends) <= BUCKETS
    assert min(sizes) >= 1
    assert all(later >= size - 1 for size, later in pairwise(sizes[1:]))


def test_buckets_are_named_by_their_first_and_last_position() -> None:
    assert bucket_ends(512) == (4, 8, 16, 32, 64, 128, 256, 512)
    assert bucket_names(bucket_ends(10)) == ["0-0", "1-1", "2-2", "3-4", "5-9"]


def test_positions_count_from_the_first_generated_token(positions_as_entropy) -> None:
    curves = TextCurves(4)  # buckets 0, 1, 2-3

    watched(curves, FIRST)

    found = {bucket: values["entropy"] for bucket, values in curves.take().items()}
    assert found == {"": 2.0, "0-0": 1.0, "1-1": 2.0, "2-3": 3.0}


def test_means_are_over_all_tokens_of_all_micro_batches(positions_as_entropy) -> None:
    curves = TextCurves(5)
    watched(curves, FIRST, [IGNORE] * 5)
    watched(curves, SECOND)

    assert curves.take()[""] == {"entropy": (1 + 2 + 3 + 0 + 1 + 2 + 3 + 4) / 8}
    assert curves.take() == {}  # the next evaluation starts from zero


def test_a_pass_keeps_its_own_weights(positions_as_entropy) -> None:
    """A function that weighs replaces the weights of its pass, so that zeros must come back."""
    curves = TextCurves(5)

    assert watched(curves, FIRST) == {}
    assert watched(curves, FIRST, plan=(Pass(weights={"kl": 0.0}),)) == {"kl": 1.0}
    weighed = Pass(weigh=lambda _: {"kl": 0.25})
    assert watched(curves, FIRST, plan=(weighed, Pass(teacher="other"))) == {"kl": 0.25}
    assert curves.watching((weighed, Pass(teacher="other")))[1] == Pass(teacher="other")


def test_the_log_has_a_key_per_bucket_and_value() -> None:
    curves = {"": {"kl": 1.0}, "0-3": {"kl": 0.5, "entropy": 2.0}}

    assert by_position(curves) == {"text/0-3/kl": 0.5, "text/0-3/entropy": 2.0}
