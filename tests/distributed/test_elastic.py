"""Several views in one backward on two ranks, at every ZeRO stage, against dense models."""

from __future__ import annotations

import functools

import elastic_cases
import pytest
from elastic_views import EVERYTHING, NARROW, NOTHING, WITHOUT
from equal_runs import difference

VIEWS = (WITHOUT, NARROW, NOTHING, EVERYTHING)


@functools.cache
def expected(family: str) -> dict:
    return elastic_cases.reference(family, VIEWS)


@pytest.mark.parametrize(
    ("stage", "family", "options"),
    [
        (0, "bert", {"shares": True}),
        (1, "bert", {"late": True}),
        (2, "bert", {"shares": True, "recomputes": True}),
        (3, "bert", {"shares": True, "late": True}),
        (3, "bert", {"recomputes": True}),
        (3, "llama", {"shares": True}),
        pytest.param(3, "bert", {}, marks=pytest.mark.slow),
        pytest.param(3, "gpt2", {"shares": True}, marks=pytest.mark.slow),
        pytest.param(3, "enct5", {"shares": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks_train_all_views_as_dense_models_would_be(workers, stage, family, options):
    found = workers(2).run("elastic_cases.train", family, VIEWS, stage, options)[0]

    start = dict(elastic_cases.prepared(family).named_parameters())
    assert difference(start, expected(family)) > 1e-3
    assert difference(found["weights"], expected(family)) <= 1e-6
    assert found["invalidations"] == 0
    if stage == 3:
        assert found["seen"] > 0
        assert found["held"] == 0
