"""HomoDistil's target, schedule and windows: how many units remain after every step."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.errors import ConfigError
from megakd.methods.homodistil import (
    HomoDistilConfig,
    Schedule,
    Target,
    schedule_of,
    target_of,
)
from megakd.models.views import View

BERT_BASE = View((12,) * 12, (3072,) * 12, 768, 64)
LLAMA = View((8,) * 4, (1792,) * 4, 512)
schedules = st.builds(
    lambda end, every, rest: Schedule(end, every, end + rest),
    st.integers(1, 80),
    st.integers(1, 99),  # from the end on: at once
    st.integers(1, 30),
)


def target(view: View, width: int, round_to: int | None = None) -> Target:
    return target_of(view, width, round_to=round_to)


@given(schedules)
def test_the_part_that_is_left_falls_from_one_to_zero_at_the_steps_that_prune(schedule):
    left = [schedule.left(step) for step in range(schedule.total + 1)]

    assert left[0] == 1
    assert left[-1] == 0
    assert all(later <= earlier for earlier, later in pairwise(left))
    for step in range(2, schedule.total + 1):
        assert schedule.prunes_after(step) or left[step] == left[step - 1]


@pytest.mark.parametrize(
    ("schedule", "left"),
    [
        # Of the units, 58 % go in the first quarter of the way, and 87.5 % in the first half.
        (Schedule(100, 1, 200), {0: 1, 25: 1 - 0.578125, 50: 0.125, 100: 0}),
        (Schedule(20, 5, 40), {0: 1, 4: 1, 5: 0.421875, 10: 0.125, 20: 0}),
        (Schedule(10, 10, 40), {9: 1, 10: 0}),
    ],
    ids=["every step", "every fifth step", "one shot"],
)
def test_a_cubic_schedule_removes_most_units_early_and_one_shot_all_at_once(schedule, left):
    assert {step: float(schedule.left(step)) for step in left} == left


@given(schedules, st.integers(1, 8))
def test_windows_cover_the_run_once_and_end_where_units_go(schedule, cuts):
    windows = schedule.windows(cuts)

    assert windows[0].first == 0
    assert windows[-1].last == schedule.total
    assert all(a.last == b.first for a, b in pairwise(windows))
    assert all(schedule.prunes_after(window.last) for window in windows[:-1])
    assert len(windows) <= cuts + 1


def test_cuts_follow_as_soon_as_their_share_of_the_units_is_masked():
    schedule = Schedule(100, 1, 200)

    result = [window.last for window in schedule.windows(4)[:-1]]

    removed = [1 - schedule.left(step) for step in result]
    earlier = [1 - schedule.left(step - 1) for step in result]
    for number, (now, before) in enumerate(zip(removed, earlier, strict=True), start=1):
        assert before < Fraction(number, 4) <= now


def test_pruning_ends_after_three_tenths_of_the_run_unless_the_config_says_when():
    facts = SimpleNamespace(steps=lambda train: train.max_steps)
    train = SimpleNamespace(max_steps=1000)
    lab: Any = SimpleNamespace(facts=facts, config=SimpleNamespace(train=train))
    configs = (
        HomoDistilConfig(name="homodistil", target_width=12, pruning_end=end) for end in (None, 7)
    )

    assert [schedule_of(config, lab).end for config in configs] == [300, 7]


@pytest.mark.parametrize("end", [1, 40])
def test_all_units_go_at_once_if_the_end_comes_before_the_second_removal(end):
    schedule = Schedule(end, end, 100)

    assert [step for step in range(101) if schedule.prunes_after(step)] == [end]
    assert [window.last for window in schedule.windows(4)] == [end, 100]


def test_a_run_has_one_window_without_cuts_and_plans_those_of_a_long_run_at_once():
    assert len(Schedule(70, 1, 100).windows(0)) == 1
    # `megakd plan` does not know the rows and takes a million steps.
    assert len(Schedule(700_000, 1, 10**6).windows(4)) == 5


@pytest.mark.parametrize(
    ("view", "options", "goal"),
    [
        (BERT_BASE, {"width": 576}, View((12,) * 12, (2304,) * 12, 576, 48)),
        (BERT_BASE, {"width": 224}, View((12,) * 12, (896,) * 12, 224, 19)),
        # Decoders lose whole heads and keep multiples of 64, at least one of each.
        (LLAMA, {"width": 256}, View((4,) * 4, (896,) * 4, 256)),
        (LLAMA, {"width": 64}, View((1,) * 4, (256,) * 4, 64)),
        (LLAMA, {"width": 128, "round_to": 1}, View((2,) * 4, (448,) * 4, 128)),
    ],
)
def test_the_target_keeps_the_same_share_of_everything(view, options, goal):
    assert target(view, **options).goal == goal


@given(st.integers(12, 767), st.integers(0, 1000))
def test_every_kind_keeps_the_same_rounded_share_at_every_time(width, thousandths):
    left, share = Fraction(thousandths, 1000), Fraction(width, 768)
    part = share + (1 - share) * left

    assert target(BERT_BASE, width=width, round_to=1).at(left) == View(
        (12,) * 12, (round(part * 3072),) * 12, round(part * 768), round(part * 64)
    )


@pytest.mark.parametrize(
    ("view", "options", "message"),
    [
        (LLAMA, {"width": 100}, "of width 512; use a multiple of 64 "),
        (LLAMA, {"width": 512}, "512 is not possible for a teacher of width 512"),
        (LLAMA, {"width": 600}, r"a multiple of 64 \(method.round_to\) below it"),
        (LLAMA, {"width": 8, "round_to": 700}, "of width 512; use a multiple of 700 "),
        (BERT_BASE, {"width": 4}, "and 0 columns per head"),
    ],
)
def test_a_width_that_cannot_be_made_is_refused_with_those_that_can(view, options, message):
    with pytest.raises(ConfigError, match=message):
        target(view, **options)
