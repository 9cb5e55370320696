"""The shapes that shrink can cut out of a model: sizes, candidates, hops and messages."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import config_tree, llama

from megakd.config.file import config_of
from megakd.contract.metric import Metric
from megakd.contract.terms import SoftTargetKl
from megakd.contract.views import View
from megakd.errors import ConfigError
from megakd.methods.shrink import LARGEST_HOP, budgets, hops, narrower
from megakd.methods.shrink.candidates import (
    TOLERANCE,
    Budget,
    Candidate,
    Cuts,
    Family,
    candidates_of,
    cuts_of,
)
from megakd.methods.shrink.stages import BestCandidate, judging_name

KL = "soft_target_kl"

# Qwen3-8B: 36 layers, 8 key-value groups of 4 query heads of 128, 12288 neurons, width 4096.
WIDTH, VOCABULARY = 4096, 151936
HEAD, NEURON, LAYER = (2 * 4 + 2) * 128 * WIDTH, 3 * WIDTH, 2 * WIDTH + 2 * 128
OUTSIDE = 2 * VOCABULARY * WIDTH + WIDTH


def counted(view: View) -> int:
    layers = zip(view.heads, view.neurons, strict=True)
    units = sum(heads * HEAD + neurons * NEURON for heads, neurons in layers)
    kept = len(view.heads) if view.layers is None else len(view.layers)
    return OUTSIDE + kept * LAYER + units


def cuts(
    layers: int = 36, heads: int = 8, neurons: int = 12288, round_to: int | None = None
) -> Cuts:
    return cuts_of(family(layers, heads, neurons, round_to=round_to), counted)


def family(
    layers: int = 36,
    heads: int = 8,
    neurons: int = 12288,
    *,
    is_stock: Callable[[View], bool] = lambda _: True,
    round_to: int | None = None,
) -> Family:
    return Family(View((heads,) * layers, (neurons,) * layers), layers, is_stock, round_to)


def budget(target: int) -> Budget:
    return Budget("method.parameters", target, TOLERANCE, lambda size: f"{size:,.0f} weights")


def chosen(possible: Cuts, target: int, wanted: Any) -> list[Candidate]:
    return candidates_of([possible], budget(target), wanted)


def config(**method: Any) -> Any:
    tree = config_tree(
        Path("out"),
        {"type": "causal_lm", "dataset": "anything"},
        teacher={"model": llama(2)},
        method={"name": "shrink", "parameters": "4B", **method.pop("method", {})},
        **method,
    )
    return config_of({**tree, "student": {"model": "from_teacher"}})


@pytest.mark.parametrize(
    ("text", "number"),
    [("0.6B", 600_000_000), ("600M", 600_000_000), ("12k", 12_000), (7, 7), ("33.2K", 33_200)],
)
def test_a_size_is_read_as_people_write_it(text, number):
    assert config(method={"parameters": text}).method.parameters == (number,)


def test_the_sizes_of_shapes_are_those_of_an_8b_model():
    result = cuts()

    assert (result.outside, result.layer) == (OUTSIDE, LAYER)
    assert (result.head, result.neuron) == (HEAD, NEURON)
    assert result.whole == Candidate(36, 8, 12288, 8_190_735_360)


def test_candidates_go_from_width_alone_to_depth_alone():
    first, *_, last = chosen(cuts(), 4_000_000_000, 6)

    assert first.layers == 36
    assert (first.heads, first.neurons) != (8, 12288)
    # One layer less could not hold the weights, so that the widths are nearly the teacher's.
    assert last.layers == min(
        n for n in range(1, 37) if cuts().with_layers(4 * 10**9, n, tolerance=TOLERANCE)
    )
    assert last.heads == 8
    assert last.neurons > 0.85 * 12288


def test_one_candidate_has_the_fewest_layers_and_they_are_whole_where_that_is_the_size():
    whole = cuts().candidate(15, 8, 12288)

    for share in (0.98, 1.0, 1.02):
        assert chosen(cuts(), round(share * whole.size), 1) == [whole]
    possible = cuts(layers=6)
    target = round(
        (possible.candidate(2, 8, 12288).size + possible.candidate(3, 8, 12288).size) / 2
    )
    (narrower,) = chosen(possible, target, 1)
    assert narrower.layers == 3
    assert (narrower.heads, narrower.neurons) < (8, 12288)


def test_heads_and_neurons_shrink_by_about_the_same_share():
    for one in chosen(cuts(), 5_000_000_000, 6):
        assert one.heads / 8 == pytest.approx(one.neurons / 12288, abs=0.13)


@given(
    layers=st.integers(1, 12),
    heads=st.integers(1, 8),
    neurons=st.integers(1, 300),
    share=st.floats(0.05, 0.99),
    wanted=st.integers(1, 8),
)
def test_a_size_has_candidates_or_the_message_names_the_nearest_sizes(
    layers, heads, neurons, share, wanted
):
    possible = cuts(layers, heads, neurons)
    target = round(share * possible.whole.size)
    if not any(
        possible.with_layers(target, depth, tolerance=TOLERANCE) for depth in range(1, layers + 1)
    ):
        with pytest.raises(ConfigError, match="nearest possible sizes are"):
            chosen(possible, target, wanted)
        return

    actual = chosen(possible, target, wanted)

    assert 1 <= len(actual) <= wanted
    assert len({one.name for one in actual}) == len(actual)
    assert all(abs(one.size - target) <= TOLERANCE * target for one in actual)
    assert all(one == possible.candidate(*one[:3]) for one in actual)
    depths = [one.layers for one in actual]
    assert depths == sorted(depths, reverse=True)


def test_the_nearest_sizes_can_be_cut():
    possible = cuts(layers=2, heads=1, neurons=640)
    with pytest.raises(ConfigError, match="1 layers, 1 key-value groups, 64 neurons") as error:
        chosen(possible, possible.outside // 2, 6)

    (size,) = re.findall(r"nearest possible sizes are ([\d,]+) ", str(error.value))
    assert chosen(possible, int(size.replace(",", "")), 1)


@pytest.mark.parametrize(
    ("target", "wanted", "message"),
    [
        (9_000_000_000, 6, r"the teacher has 8,190,735,360 weights; give a smaller"),
        (5_000_000_000, (0.25,), r"method\.candidates: no model .* has 9 of the teacher's 36"),
    ],
)
def test_a_size_or_a_share_of_layers_that_cannot_be_cut_is_refused(target, wanted, message):
    with pytest.raises(ConfigError, match=message):
        chosen(cuts(), target, wanted)


@pytest.mark.parametrize(
    ("neurons", "round_to", "grid"),
    [(172, None, 4), (11008, None, 64), (255, None, 1), (172, 50, 50)],
)
def test_neurons_stay_on_a_grid_that_divides_the_teachers(neurons, round_to, grid):
    result = cuts(neurons=neurons, round_to=round_to).neurons

    assert result[0] == grid
    assert all(count % grid == 0 for count in result[:-1])
    assert result[-1] == neurons


def test_a_grid_larger_than_the_teacher_and_layers_that_differ_are_refused():
    with pytest.raises(ConfigError, match=r"method\.round_to: 256 is larger than 172"):
        cuts(neurons=172, round_to=256)
    with pytest.raises(ConfigError, match="all have the same numbers"):
        cuts_of(Family(View((2, 1), (8, 8)), 2, lambda _: True, None), counted)


def test_heads_that_no_stock_config_describes_are_no_candidates():
    result = cuts_of(family(is_stock=lambda view: view.heads[0] in (4, 8)), counted)

    assert result.heads == (4, 8)
    with pytest.raises(ConfigError, match="none has 4 key-value groups of this width"):
        family(2, 4, 64, is_stock=lambda view: False).possible()


@pytest.mark.parametrize(
    ("width", "heads", "expected"), [(384, 12, [288, 192]), (512, 6, [384, 256]), (192, 3, [128])]
)
def test_widths_are_three_quarters_and_half_in_whole_heads(width, heads, expected):
    assert narrower(width, heads) == expected


def test_the_most_important_layers_are_kept_in_their_order():
    view = Candidate(2, 3, 5, 0).view((0.1, 0.9, 0.2, 0.9), View((8,) * 4, (8,) * 4))

    assert view == View((0, 3, 0, 3), (0, 5, 0, 5), layers=(2, 4))


def test_hops_are_at_most_two_and_a_half_and_end_at_the_target():
    method, teacher = config(method={"assistant": "auto_2.5", "parameters": "1B"}).method, 8 * 10**9

    result = [one.target for one in hops(method, budgets(method, teacher), teacher)]

    ratios = [big / small for big, small in pairwise([teacher, *result])]
    assert result[-1] == 1_000_000_000
    assert len(result) == 3
    assert max(ratios) <= LARGEST_HOP
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-6)


@pytest.mark.parametrize(
    ("divergences", "score", "chosen"),
    [([0.5, 0.2, 0.2], -0.2, "b"), ([math.nan, 9.0, 9.5], -9.0, "b")],
    ids=["first of equals", "not a number"],
)
def test_the_judge_takes_the_lowest_divergence(divergences, score, chosen):
    judge = BestCandidate(Metric(name=KL, parts=(KL,), higher_is_better=False), ("a", "b", "c"))
    scores = {name: {KL: value} for name, value in zip("abc", divergences, strict=True)}

    assert judge(scores, 3)[:2] == (score, chosen)


@pytest.mark.parametrize(
    ("source", "name"),
    [(None, "soft_target_kl"), ("data", "soft_target_kl_on_data"), ("rollouts", None)],
)
def test_candidates_are_compared_by_the_term_that_held_out_texts_have(source, name):
    term = SoftTargetKl(loss="soft_target_kl", on=source)

    assert judging_name(term, "soft_target_kl") == name
    assert judging_name(term, "soft_target_reverse_kl") is None
