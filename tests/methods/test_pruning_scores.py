"""HomoDistil's averages, groups of units, and selections."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_cuts import build, full_view

from megakd.engine.optimizer_state import Shard
from megakd.methods.homodistil import strategy
from megakd.methods.homodistil.strategy import (
    Group,
    everything,
    group_sizes,
    select,
    update_averages,
)
from megakd.models.elastic import unit_makers
from megakd.models.structure import architecture_of

BERT = build("bert", "mlm")


@pytest.mark.parametrize(
    ("steps", "beta", "sensitivity"),
    [
        # The mean of half the first step (1, 1.5) and the second step (4, 1).
        ([([2.0, -3.0], [1.0, 1.0]), ([4.0, 0.5], [-1.0, 2.0])], 0.5, [2.5, 1.25]),
        ([([5.0], [-3.0]), ([2.0], [-3.0])], 0.0, [6.0]),
        # A step that overflowed.
        ([([1.0] * 3, [math.inf, math.nan, 2.0])], 0.5, [0.0, 0.0, 1.0]),
    ],
    ids=["mean", "last step", "overflow"],
)
def test_averages_are_exponential_means_of_sensitivities(monkeypatch, steps, beta, sensitivity):
    averages: dict = {}
    monkeypatch.setattr(strategy, "BETA", beta)

    for weight, gradient in steps:
        shard = Shard("w", torch.tensor(weight), torch.tensor(gradient), 0)
        update_averages(averages, shard)
        assert shard.weight.tolist() == weight

    assert averages["w"].tolist() == sensitivity


def student_of(model):
    architecture = architecture_of(model.config)
    return SimpleNamespace(makers=unit_makers(model), units=architecture.prunable(model.config))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), width=st.integers(1, 24), columns=st.integers(1, 4))
def test_a_selection_keeps_the_best_units_of_every_group(seed, width, columns):
    student = student_of(BERT)
    sizes = group_sizes(student.makers, student.units)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(sum(sizes.values()), generator=generator, dtype=torch.float64)
    wanted = full_view(BERT)._replace(width=width, neurons=(7, 1, 20), head_width=columns)

    kept = select(scores, everything(student), wanted, student)

    parts = dict(zip(sizes, scores.split([*sizes.values()]), strict=True))
    best = parts[Group("width", 0, None)].topk(width).indices.sort().values.tolist()
    assert kept[Group("width", 0, None)] == best
    for number, count in enumerate((7, 1, 20)):
        group = Group("neurons", number, None)
        assert kept[group] == parts[group].topk(count).indices.sort().values.tolist()
    queries = kept[Group("heads", 0, "queries")]
    assert [place // 4 for place in queries] == [head for head in range(6) for _ in range(columns)]


def test_removed_units_never_return():
    student = student_of(BERT)
    count = sum(group_sizes(student.makers, student.units).values())
    rising = torch.arange(count, dtype=torch.float64)
    wanted = full_view(BERT)._replace(width=3, head_width=2, neurons=(4, 4, 4))
    before = select(rising, everything(student), wanted, student)

    same = select(rising.flip(0), before, wanted, student)

    assert same == before != select(rising.flip(0), everything(student), wanted, student)


def test_of_equal_scores_the_first_units_stay():
    student = student_of(BERT)
    count = sum(group_sizes(student.makers, student.units).values())
    wanted = full_view(BERT)._replace(width=3, head_width=2)

    scores = torch.zeros(count, dtype=torch.float64)
    kept = select(scores, everything(student), wanted, student)

    assert kept[Group("width", 0, None)] == [0, 1, 2]
    assert kept[Group("heads", 1, "values")][:4] == [0, 1, 4, 5]
