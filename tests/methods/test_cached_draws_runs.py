"""Students of a language model that learn from draws on disk, as a user has them made."""

from __future__ import annotations

import pytest
import torch
from cache_bench import Bench, furthest

DRAWS = {"cache_draws": 16}


@pytest.fixture(scope="module")
def language(one_rank, tmp_path_factory) -> Bench:
    return Bench(one_rank, tmp_path_factory.mktemp("draws"), language=True)


def test_a_student_learns_from_draws_and_comes_nearer_to_the_teachers_with_more(language):
    online = language.weights(language.config("online"))
    initial = language.weights(language.config("none", train={"learning_rate": 0.0}))
    found = []
    for draws in (1, 255):
        config = language.config(f"of-{draws}", cache=f"of-{draws}", teacher={"cache_draws": draws})
        said = language.cache(config)
        assert f"rows of {16 * draws * 5} bytes" in said  # 16 positions, ids of 4 bytes and counts
        found.append(language.weights(config))

    assert all(torch.isfinite(weight).all() for weight in found[1].values())
    few, many = (furthest(weights, online) for weights in found)
    assert many < furthest(initial, online) / 2
    assert many < few / 2


def test_a_cache_of_the_other_kind_is_refused_naming_both(language):
    language.cache(language.config("kept", cache="of-the-best"))
    language.cache(language.config("drawn", cache="of-draws", teacher=DRAWS))
    wrong = [
        language.config("want-draws", cache="of-the-best", teacher=DRAWS),
        language.config("want-best", cache="of-draws"),
        language.config("want-more", cache="of-draws", teacher={"cache_draws": 17}),
        language.config("want-other", cache="of-draws", teacher={**DRAWS, "cache_seed": 3}),
    ]

    trained = [language.one_rank.train("--config", path) for path in wrong]
    written = [language.one_rank.megakd("cache", path) for path in wrong]

    for said in (trained, written):
        assert [one.code for one in said] == [2] * 4
        assert "top_k: 64 there, absent here; draws: absent there, 16 here" in said[0].err
        assert "draws: 16 there, absent here" in said[1].err
        assert "draws: 16 there, 17 here" in said[2].err
        assert "draws_seed: 0 there, 3 here" in said[3].err


def test_a_run_from_other_draws_is_another_run(language):
    config = language.config("run", cache="run-draws", teacher=DRAWS)
    language.cache(config)
    language.weights(config)
    other = language.config("run", cache="other-draws", teacher={**DRAWS, "cache_seed": 3})
    language.cache(other)

    said = language.one_rank.train("--config", other)

    assert said.code == 2
    assert "teacher.cache_seed: 0 there, 3 here" in said.err


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"loss": "soft_target_jsd"}, "and teacher.cache holds only random draws, which suffice"),
        (
            {"loss": "soft_target_kl", "temperature": 2.0},
            "at temperature 2: teacher.cache holds only random draws, at temperature 1",
        ),
    ],
)
def test_terms_that_draws_cannot_tell_are_refused(language, term, message):
    config = language.config("refused", cache="some", teacher=DRAWS, objective=[term])

    said = language.one_rank.train("--config", config)

    assert said.code == 2
    assert message in said.err


def test_draws_need_a_cache_and_a_causal_language_model(language):
    alone = language.one_rank.train("--config", language.config("alone", teacher=DRAWS))
    task = {"type": "classification"}
    config = language.config("classes", cache="some", teacher=DRAWS, task=task)

    assert "teacher.cache_draws: 16, and the teacher has no cache that keeps draws" in alone.err
    said = language.one_rank.train("--config", config).err
    assert (
        "teacher.cache_draws: supported only for causal_lm, and task.type is classification" in said
    )


def test_a_number_of_draws_that_a_count_cannot_hold_is_refused(language):
    config = language.config("many", cache="some", teacher={"cache_draws": 256})

    said = language.one_rank.train("--config", config)

    assert said.code == 2
    assert "teacher.cache_draws" in said.err
    assert "255" in said.err
