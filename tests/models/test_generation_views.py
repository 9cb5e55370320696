"""Completions of elastic models that run as a cut of themselves."""

from __future__ import annotations

import pytest
from elastic_views import NARROW, UNEVEN, WITHOUT, cut, family_model, masked

from megakd.contract.completions import Sampling, TextTokens
from megakd.contract.views import Cut
from megakd.models.elastic import Elastic
from megakd.models.generation import complete

PROMPTS = [[5, 6, 7], [8], [1, 2, 3, 4, 5, 6, 1]]


def texts(model):
    found = complete(
        model,
        PROMPTS,
        [1, 2, 3],
        Sampling(8),
        tokens=TextTokens(frozenset(), pad=1),
        rows_at_once=2,
    )
    return [completion.ids for completion in found]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize(
    ("view", "dense"),
    [(UNEVEN, masked), (WITHOUT, masked), (NARROW, cut)],
    ids=["uneven", "without", "narrow"],
)
def test_an_elastic_model_generates_as_the_model_that_it_runs_as(family, view, dense):
    model = family_model(family, tie_word_embeddings=False)
    whole, expected = texts(model), texts(dense(model, view))
    elastic = Elastic(model)

    elastic.keep(Cut(None, view))
    assert texts(model) == expected != whole

    elastic.keep(None)
    assert texts(model) == whole
