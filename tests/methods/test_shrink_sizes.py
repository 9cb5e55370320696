"""The shapes that shrink can cut out of a model: sizes, times and messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import config_tree, llama

from megakd.config.file import config_of
from megakd.errors import ConfigError
from megakd.methods.shrink import (
    SPEED_TOLERANCE,
    TOLERANCE,
    Budget,
    Shape,
    Shapes,
    fitting,
    measured_shape,
    shapes_of,
)
from megakd.models.experts import FoundExperts
from megakd.models.views import View

# Qwen3-8B: 36 layers, 8 key-value groups of 4 query heads of 128, 12288 neurons, width 4096.
WIDTH, VOCABULARY = 4096, 151936
HEAD, NEURON, LAYER = (2 * 4 + 2) * 128 * WIDTH, 3 * WIDTH, 2 * WIDTH + 2 * 128
OUTSIDE = 2 * VOCABULARY * WIDTH + WIDTH


def counted(shape: Shape) -> int:
    return OUTSIDE + shape.layers * (LAYER + shape.heads * HEAD + shape.neurons * NEURON)


def teacher(units: View) -> Any:
    depth, experts = len(units.heads), FoundExperts()
    return SimpleNamespace(depth=depth, units=units, whole=units, why_fixed=None, experts=experts)


def shapes(
    layers: int = 36,
    heads: int = 8,
    neurons: int = 12288,
    round_to: int | None = None,
    *,
    is_stock: Callable[[View], bool] = lambda _: True,
    size: Callable[[Shape], float] = counted,
) -> Shapes:
    model = teacher(View((heads,) * layers, (neurons,) * layers))
    facts = SimpleNamespace(has_stock_config=lambda _, view: is_stock(view))
    lab: Any = SimpleNamespace(facts=facts)
    config: Any = SimpleNamespace(round_to=round_to, parameters=1)
    result = shapes_of(config, lab, model)
    return replace(result, sizes=tuple(map(size, result.corners)))


def budget(target: float) -> Budget:
    text = "{:,.0f} weights".format
    return Budget("method.parameters", target, TOLERANCE, TOLERANCE, text)


def chosen(possible: Shapes, target: float) -> Shape:
    return measured_shape(possible, budget(target), possible.size)


def config(**method: Any) -> Any:
    tree = config_tree(
        Path("out"),
        {"type": "causal_lm", "dataset": "anything"},
        teacher={"model": llama(2)},
        method={"name": "shrink", **method},
    )
    return config_of({**tree, "student": {"model": "from_teacher"}})


@pytest.mark.parametrize(
    ("key", "text", "number"),
    [
        ("parameters", "0.6B", 600_000_000),
        ("parameters", "12k", 12_000),
        ("parameters", "33.2K", 33_200),
        ("parameters", "600M", 600_000_000),
        ("parameters", 7, 7),
        ("flops", "12%", 0.12),
        ("flops", 0.12, 0.12),
        ("speedup", "8x", 8.0),
        ("speedup", 8, 8.0),
    ],
)
def test_sizes_are_read_as_people_write_them(key, text, number):
    assert getattr(config(**{key: text}).method, key) == number


def test_the_sizes_of_shapes_are_those_of_an_8b_model():
    possible = shapes()

    assert possible.size(possible.corners[0]) == 8_190_735_360
    for shape in (Shape(36, 8, 64), Shape(1, 1, 12288), Shape(17, 5, 6400)):
        assert possible.size(shape) == pytest.approx(counted(shape), rel=1e-9)


def test_the_layers_are_the_fewest_and_whole_where_that_is_the_size():
    whole = Shape(15, 8, 12288)

    for share in (0.98, 1.0, 1.02):
        assert chosen(shapes(), share * counted(whole)) == whole
    few = shapes(layers=6)
    between = (counted(Shape(2, 8, 12288)) + counted(Shape(3, 8, 12288))) / 2
    narrower = chosen(few, between)
    assert narrower.layers == 3
    assert (narrower.heads, narrower.neurons) < (8, 12288)
    assert narrower.heads / 8 == pytest.approx(narrower.neurons / 12288, abs=0.13)


@given(
    layers=st.integers(1, 12),
    heads=st.integers(1, 8),
    neurons=st.integers(1, 300),
    share=st.floats(0.05, 0.99),
)
def test_a_shape_has_the_size_or_the_message_names_the_nearest_sizes(layers, heads, neurons, share):
    possible = shapes(layers, heads, neurons)
    target = share * counted(possible.corners[0])

    def fits(shape: Shape) -> bool:
        return abs(counted(shape) - target) <= 0.999 * TOLERANCE * target

    every = (
        Shape(depth, count, number)
        for depth in range(1, layers + 1)
        for count in possible.heads
        for number in possible.neurons
    )
    fewest = next(filter(fits, every), None)

    if fitting(possible, budget(target)) is None:
        assert fewest is None
        with pytest.raises(ConfigError, match="nearest possible sizes are"):
            chosen(possible, target)
        return
    actual = chosen(possible, target)
    assert abs(counted(actual) - target) <= 1.001 * TOLERANCE * target
    is_whole = actual[1:] == possible.corners[0][1:]
    assert is_whole or fewest is None or actual.layers <= fewest.layers


def test_the_nearest_sizes_can_be_cut():
    possible = shapes(layers=2, heads=1, neurons=640)
    with pytest.raises(ConfigError, match="1 layer, 1 key-value group, 64 neurons") as error:
        chosen(possible, OUTSIDE // 2)

    (size,) = re.findall(r"nearest possible sizes are ([\d,]+) ", str(error.value))
    assert chosen(possible, int(size.replace(",", "")))


@pytest.mark.parametrize(
    ("neurons", "round_to", "grid"),
    [(172, None, 4), (11008, None, 64), (255, None, 1), (172, 50, 50)],
)
def test_neurons_stay_on_a_grid_that_divides_the_teachers(neurons, round_to, grid):
    result = shapes(neurons=neurons, round_to=round_to).neurons

    assert result[0] == grid
    assert all(count % grid == 0 for count in result[:-1])
    assert result[-1] == neurons


def test_a_grid_larger_than_the_teacher_is_refused():
    with pytest.raises(ConfigError, match=r"method\.round_to: 256 is larger than 172"):
        shapes(neurons=172, round_to=256)


def test_layers_of_a_teacher_that_was_cut_layer_by_layer_stay_as_they_are():
    result = shapes_of(config(parameters=7).method, None, teacher(View((2, 1), (8, 8))))
    assert (result.heads, result.neurons) == ((2,), (8,))
    assert Shape(1, 2, 8).view(teacher(View((2, 1), (8, 8))), (2,)) == View(
        (0, 1), (0, 8), layers=(2,)
    )


def test_a_hybrid_keeps_as_many_heads_in_each_layer_that_has_any():
    lab: Any = SimpleNamespace(facts=SimpleNamespace(has_stock_config=lambda *_: True))
    hybrid = teacher(View((0, 0, 4, 0, 0, 4), (0,) * 6))
    assert shapes_of(config(parameters=7).method, lab, hybrid).heads == (1, 2, 3, 4)
    view = Shape(3, 2, 0).view(hybrid, (1, 3, 4))
    assert view == View((0, 0, 2, 0, 0, 0), (0,) * 6, layers=(1, 3, 4))


def test_heads_that_no_stock_config_describes_are_not_cut_to():
    assert shapes(is_stock=lambda view: view.heads[0] in (4, 8)).heads == (4, 8)
    assert shapes(2, 4, 64, is_stock=lambda _: False).heads == (4,), "all heads stay"


def test_the_layers_that_stay_have_the_units_of_the_shape():
    view = Shape(2, 3, 5).view(teacher(View((8,) * 4, (8,) * 4)), (2, 4))

    assert view == View((0, 3, 0, 3), (0, 5, 0, 5), layers=(2, 4))


def clock(shape: Shape) -> float:
    """Time of a shape in no line: the first layers cost more, and so do the first neurons."""
    return 2 + shape.layers**1.1 * (10 + (shape.neurons / 16) ** 1.05)


WHOLE = clock(Shape(6, 4, 256))


def timed_shape(
    speedup: float,
    *,
    estimate: float = 1.0,
    time: Callable[[Shape], float] = clock,
    asked: list[Shape] | None = None,
) -> Shape:
    """The shape of a speed-up; `estimate` is a factor of the first times."""
    possible = shapes(
        6, 4, 256, 8, is_stock=lambda view: max(view.heads) == 4, size=lambda o: clock(o) / WHOLE
    )
    whole, *others = possible.sizes
    possible = replace(possible, sizes=(whole, *(min(1, estimate * size) for size in others)))

    def measure(shape: Shape) -> float:
        if asked is not None:
            asked.append(shape)
        return time(shape) / WHOLE

    text = "{:.3f}".format
    target, loose = 1 / speedup, 2 * SPEED_TOLERANCE
    speed = Budget("method.speedup", target, SPEED_TOLERANCE, loose, text)
    return measured_shape(possible, speed, measure)


@pytest.mark.parametrize("estimate", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("speedup", [1.3, 2, 3, 6])
def test_a_shape_has_the_speed_up_though_the_first_times_mislead(speedup, estimate):
    shape = timed_shape(speedup, estimate=estimate)

    assert WHOLE / clock(shape) == pytest.approx(speedup, rel=0.06)
    # Fewer layers would be too fast.
    fewer = (Shape(depth, 4, 256) for depth in range(1, shape.layers))
    assert estimate != 1.0 or all(WHOLE / clock(one) > 1.04 * speedup for one in fewer)


def test_another_depth_is_timed_where_the_fewest_layers_turn_out_too_fast():
    # What the first times do not tell: two layers alone take half of their time.
    asked: list[Shape] = []
    shape = timed_shape(
        3, time=lambda one: clock(one) * (0.5 if one.layers == 2 else 1.0), asked=asked
    )

    assert asked[0].layers == 2
    assert shape.layers > 2
    assert len(asked) == len({*asked})


def test_a_speed_up_that_no_shape_has_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no model with 0\.020 .*sizes are [\d.]+ \(1 layer"):
        timed_shape(50)
    with pytest.raises(ConfigError, match=r"no model with 0\.333 "):
        timed_shape(3, time=lambda _: 2 * WHOLE)
