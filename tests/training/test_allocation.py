"""Units that a sub-network keeps: counts, nesting, rounding, refused options."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megakd.errors import ConfigError, TeacherError
from megakd.models.views import View
from megakd.training.allocation import (
    SortedTeacher,
    UnitScores,
    unit_order,
    view_at,
)

GRID = (0.0, 0.1, 0.3, 0.35, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
# Few different scores, so that many are equal.
score = st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.5000001, 0.9])
layers = st.lists(st.lists(score, min_size=1, max_size=40).map(tuple), min_size=1, max_size=4)
unit_scores = st.builds(UnitScores, layers.map(tuple), layers.map(tuple))
allocations = st.sampled_from(["global", "uniform"])
roundings = st.sampled_from([1, 2, 8])
head_widths = st.sampled_from([4, 12, 16, 64])


def ranked(result):
    found = SimpleNamespace(heads=SimpleNamespace(can_lose_all=True))
    architecture = SimpleNamespace(found_units=lambda _: found, rows_of_heads=lambda _: 8)
    source: Any = SimpleNamespace(architecture=architecture, config=None)
    return SortedTeacher(source=source, scores=result)


def spread(count, layer):
    """Different scores, the later layers' a little higher."""
    return tuple(((7 * unit + 3 * layer) % count + layer / 2) / count for unit in range(count))


def scores(heads, neurons):
    return UnitScores(
        heads=tuple(spread(count, layer) for layer, count in enumerate(heads)),
        neurons=tuple(spread(count, layer) for layer, count in enumerate(neurons)),
    )


def view_or_none(result, sparsity, **options):
    try:
        return view_at(result, sparsity, **options)
    except TeacherError:
        return None


@given(unit_scores, st.sampled_from(GRID))
def test_a_share_of_all_layers_is_removed_and_none_is_more_important_than_a_kept_one(
    drawn, sparsity
):
    view = view_or_none(drawn, sparsity, round_to=1)
    assume(view is not None)

    for kept, layers in ((view.heads, drawn.heads), (view.neurons, drawn.neurons)):
        falling = [sorted(layer, reverse=True) for layer in layers]
        inside = [s for layer, count in zip(falling, kept, strict=True) for s in layer[:count]]
        outside = [s for layer, count in zip(falling, kept, strict=True) for s in layer[count:]]
        assert max(outside, default=0.0) <= min(inside, default=1.0)
        assert len(outside) == round(Fraction(str(sparsity)) * (len(inside) + len(outside)))


def test_importance_is_compared_between_layers_in_units_of_their_norms():
    result = UnitScores(((30.0, 40.0), (3.0, 4.0)), ((6.0, 8.0, 0.0), (0.6, 0.8, 0.0)))

    view = ranked(result).view_at(0.5, allocation="global", round_to=1)

    assert (view.heads, view.neurons) == ((1, 1), (2, 1))
    louder = UnitScores((result.heads[0], (3e3, 4e3)), result.neurons)
    assert ranked(louder).view_at(0.5, allocation="global", round_to=1) == view


@settings(max_examples=50)
@given(unit_scores, allocations, roundings, head_widths, st.booleans())
def test_sparsity_0_keeps_everything_and_sparser_views_lie_within_the_others(
    drawn, allocation, round_to, width, keeps_one
):
    options = {"allocation": allocation, "round_to": round_to, "head_width": width}
    options["with_heads"] = (0,) if keeps_one else ()

    views = [view_or_none(drawn, sparsity, **options) for sparsity in GRID]

    assert views[0] == View(*(tuple(map(len, kind)) for kind in (drawn.heads, drawn.neurons)))
    there = [view for view in views if view is not None]
    assert views == there + [None] * (len(views) - len(there))  # what has run out stays so
    assert all(inner.within(outer) for outer, inner in pairwise(there))


@given(unit_scores)
def test_the_order_is_by_falling_score_and_equal_ones_stay_as_they_stand(drawn):
    order = unit_order(drawn)

    for units, layer in zip(order.heads + order.neurons, drawn.heads + drawn.neurons, strict=True):
        assert list(units) == sorted(range(len(layer)), key=lambda unit: (-layer[unit], unit))


# Removed of 64 neurons, and what 8 * round(removed / 8) makes of it: halves to the even number.
@pytest.mark.parametrize(
    ("removed", "rounded"), [(3, 0), (4, 0), (5, 8), (12, 16), (20, 16), (28, 32), (43, 40)]
)
def test_neurons_are_removed_in_multiples_of_eight(removed, rounded):
    view = view_at(scores((4,), (64,)), removed / 64)

    assert view.neurons == (64 - rounded,)


# 3 of 7 heads are removed; of width 12 or 4 two at a time, and 1.5 times two becomes twice two.
@pytest.mark.parametrize(("width", "kept"), [(64, 4), (12, 3), (4, 3)])
def test_heads_are_removed_whole_and_in_multiples_of_eight_rows(width, kept):
    view = view_at(scores((7,), (70,)), 3 / 7, head_width=width)

    assert view.heads == (kept,)


def test_a_layer_of_fewer_than_eight_rows_keeps_none():
    # 13 of 20 neurons are removed: 16 after rounding, which leaves 4 rows.
    result = UnitScores(heads=((1.0, 1.0),), neurons=((0.1,) * 20, (0.9,) * 80))

    assert view_at(result, 0.13).neurons == (0, 80)
    assert view_at(result, 0.13, round_to=1).neurons == (7, 80)


def test_layers_that_matter_less_lose_more_and_may_lose_all():
    result = UnitScores(heads=((0.1, 0.2), (0.8, 0.9)), neurons=((0.1,) * 16, (0.9,) * 16))
    apart = result._replace(heads=((0.8, 0.9), (0.1, 0.2)))  # heads and neurons are ranked apart
    equal = UnitScores(heads=((1.0,) * 4,) * 3, neurons=((1.0,) * 32,) * 3)

    assert view_at(result, 0.5) == View((0, 2), (0, 16))
    assert view_at(result, 0.5, allocation="uniform") == View((1, 1), (8, 8))
    assert view_at(apart, 0.5) == View((2, 0), (0, 16))
    assert view_at(equal, 0.5) == View((2, 2, 2), (16, 16, 16))


@given(unit_scores, st.sampled_from(GRID), roundings)
def test_neurons_go_in_multiples_of_the_rounding_or_all(drawn, sparsity, round_to):
    view = view_or_none(drawn, sparsity, round_to=round_to)
    assume(view is not None)

    for count, layer in zip(view.neurons, drawn.neurons, strict=True):
        assert count == 0 or (len(layer) - count) % round_to == 0


def test_an_attention_that_is_looked_at_keeps_its_best_head():
    result = UnitScores(heads=((0.1, 0.2), (0.8, 0.9)), neurons=((1.0,) * 16,) * 2)

    assert view_at(result, 0.5).heads == (0, 2)
    assert view_at(result, 0.5, with_heads=(0,)).heads == (1, 1)
    assert view_at(result, 0.9, with_heads=(0,), round_to=1).heads == (1, 0)


# Heads of 4 rows go in twos, and no fewer than two are left: of 3 none can go.
@pytest.mark.parametrize(("count", "kept"), [(3, 3), (4, 2), (5, 3), (1, 1)])
def test_an_attention_that_is_looked_at_keeps_as_few_heads_as_rounding_allows(count, kept):
    result = UnitScores(heads=((0.1,) * count, (0.9,) * 12), neurons=((1.0,) * 160,))

    assert view_at(result, 0.9, head_width=4, with_heads=(0,)).heads[0] == kept


def test_a_sparsity_is_the_decimal_number_it_is_written_as():
    view = view_at(scores((2,), (90,)), 0.35, round_to=1)

    assert 0.35 * 90 < 31.5  # in floating point
    assert view.neurons == (90 - 32,)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(ConfigError, match=rf"at least 0 and below 1 \(got {sparsity}\)"):
        view_at(scores((2,), (32,)), sparsity)


@pytest.mark.parametrize(
    ("heads", "neurons", "message"),
    [
        (
            (2, 2),
            (32, 32),
            r"attention heads .*of 2 has 2 and would keep 0 .*\(at sparsity 0.9\); "
            r"lower method.target_sparsity",
        ),
        (
            (20,),
            (32,),
            "neurons of the teacher are left: feed-forward 1 of 1 has 32 and would keep 3.*"
            "removes units in steps of 8 and keeps at least 8 or none",
        ),
    ],
    ids=["heads", "neurons"],
)
def test_a_teacher_without_enough_units_is_refused_saying_what_rounding_does(
    heads, neurons, message
):
    with pytest.raises(TeacherError, match=message):
        view_at(scores(heads, neurons), 0.9)


def test_a_uniform_cut_may_leave_no_layer_empty():
    result = scores((2, 12), (64, 64))

    assert sum(view_at(result, 0.8).heads) == 3
    with pytest.raises(TeacherError, match="attention 1 of 2 has 2 and would keep 0"):
        view_at(result, 0.8, allocation="uniform")


def test_layers_without_units_are_left_as_they_are():
    result = scores((0, 4), (0, 64))

    for allocation in ("global", "uniform"):
        assert view_at(result, 0.5, allocation=allocation) == View((0, 2), (0, 32))
