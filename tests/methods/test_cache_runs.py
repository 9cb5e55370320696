"""Students that learn from teachers' answers on disk, as a user has them made."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from cache_bench import VOCABULARY, Bench, furthest
from tiny_runs import NO_DROPOUT, bert, write_config
from whole_run import finish, records

from megakd.run.holder import written_once


@pytest.fixture(scope="module")
def classes(one_rank, tmp_path_factory) -> Bench:
    return Bench(one_rank, tmp_path_factory.mktemp("classes"), language=False)


@pytest.fixture(scope="module")
def language(one_rank, tmp_path_factory) -> Bench:
    return Bench(one_rank, tmp_path_factory.mktemp("language"), language=True)


def test_a_classifier_learns_from_its_cache_what_it_learns_from_the_teacher(classes):
    online = classes.weights(classes.config("online"))
    config = classes.config("offline", cache="answers")
    classes.cache(config)

    assert furthest(classes.weights(config), online) <= 1e-5


@pytest.mark.parametrize("losses", [False, True])
def test_a_run_that_keeps_the_answers_learns_what_it_learns_from_the_teacher(classes, losses):
    # More steps than an epoch has, so that rows are read again; held-out losses ask the teacher.
    both = {"train": {"max_steps": 20}, "eval": {"losses": losses}}
    online = classes.weights(classes.config(f"asked-{losses}", **both))
    kept = {"teacher": {"cache": "auto"}, **both}

    assert furthest(classes.weights(classes.config(f"kept-{losses}", **kept)), online) <= 1e-5

    assert (classes.folder / f"kept-{losses}" / "stages" / "teacher-answers").is_dir()


def test_texts_are_evaluated_where_answers_are_kept(language):
    generation = {"max_new_tokens": 4, "prompt_tokens": 4}
    kept = {"cache": "auto", "cache_top_k": 8}
    config = language.config("texts", teacher=kept, eval={"generation": generation})

    language.weights(config)

    keys = {key for r in records(language.folder / "texts", "student") for key in r}
    assert "eval/text_tokens" in keys, keys


def test_a_cache_of_the_whole_vocabulary_teaches_what_the_teacher_does(language):
    online = language.weights(language.config("online"))
    config = language.config("offline", cache="all", teacher={"cache_top_k": VOCABULARY})
    language.cache(config)

    # Logarithms are kept in fp16.
    assert furthest(language.weights(config), online) <= 2e-3


def test_of_a_large_vocabulary_the_largest_are_kept_and_the_rest_is_one_more(language):
    config = language.config("some", cache="some-answers", teacher={"cache_top_k": 8})

    outcome = language.cache(config)
    weights = language.weights(config)

    assert "of 768 bytes" in outcome  # 16 positions of 8 ids of 4 bytes and logarithms of 2
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    initial = language.weights(language.config("initial", train={"learning_rate": 0.0}))
    assert furthest(weights, initial) > 1e-3


def test_a_cache_of_other_texts_or_another_teacher_is_refused(classes):
    classes.cache(classes.config("first", cache="first-answers"))
    other = {"teacher": {"model": bert(3, width=24, **NO_DROPOUT)}}
    wrong: dict[str, dict[str, Any]] = {
        "first-answers holds the cache of another teacher, other data or another setting "
        "(max_length: ": {"task": {"max_length": 8}},
        "teacher.config.num_hidden_layers: 2 there, 3 here": other,
        "seed: 42 there, 9 here": {"seed": 9},  # the teacher's weights are random
    }
    for message, sections in wrong.items():
        config = classes.config("other", cache="first-answers", **sections)

        outcome = classes.one_rank.train("--config", config, code=2)

        assert message in outcome.err


def test_a_cache_serves_other_seeds_and_other_choices_of_labels_and_held_out_rows(classes):
    classes.weights(classes.config("learned"))
    stored = {"model": str(classes.folder / "learned" / "final")}
    kept = {"labelled_examples": 20, "max_eval_examples": 4}
    classes.cache(classes.config("some", cache="kept-answers", task=kept, teacher=stored))
    fewer = {"labelled_examples": 10, "max_eval_examples": 3}

    again = classes.config("again", cache="kept-answers", task=fewer, teacher=stored, seed=9)

    finish(classes.one_rank, again)


def test_a_config_without_a_cache_has_nothing_to_make(classes):
    outcome = classes.one_rank.megakd("cache", classes.config("online-again"), code=2)

    assert "no teacher has a cache: set teacher.cache" in outcome.err


def test_every_teacher_of_a_pool_has_its_own_cache(classes):
    caches = [classes.folder / "of-1", classes.folder / "of-2"]
    pool = [
        {"name": f"of-{n}", "model": bert(n, **NO_DROPOUT), "cache": str(cache)}
        for n, cache in enumerate(caches, 1)
    ]
    tree = json.loads(classes.config("pool").read_text())
    del tree["teacher"]
    tree |= {"teachers": pool, "method": {"name": "skdbert"}}
    config = write_config(classes.folder / "pool.yaml", tree)

    classes.cache(config)
    finish(classes.one_rank, config)

    assert all((cache / "cache.json").is_file() for cache in caches)


DRAWS = {"cache_draws": 16}
# The losses are the method's own, which no objective in the config has named; a flow needs two
# layers.
INSIDE = {
    "method": {"name": "knowledge_selection", "policy": "random_hard"},
    "objective": None,
    "student": {"model": bert(2, **NO_DROPOUT)},
}


def of(loss: str, *, teacher: dict[str, Any] | None = None, **options: float) -> dict[str, Any]:
    return {"objective": [{"loss": loss, **options}], "teacher": teacher or {}}


# By message: the kind of rows, and the sections of the config.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "some/cache.json does not exist; create the cache first": ("classes", {}),
    "hidden_mse needs more than outputs, which teacher.cache holds": ("classes", of("hidden_mse")),
    "teacher.cache holds only the outputs of the teacher": ("classes", INSIDE),
    "needs all probabilities, and teacher.cache": ("language", of("soft_target_reverse_kl")),
    "temperature 1, because teacher.cache holds the largest probabilities": (
        "language",
        of("soft_target_kl", temperature=2.0),
    ),
    "needs all probabilities, and teacher.cache holds random draws": (
        "language",
        of("soft_target_jsd", teacher=DRAWS),
    ),
    "needs temperature 1, because teacher.cache holds random draws": (
        "language",
        of("soft_target_kl", teacher=DRAWS, temperature=2.0),
    ),
    "teacher.cache_draws: supported only for causal_lm, and task.type is classification": (
        "language",
        {"teacher": DRAWS, "task": {"type": "classification"}},
    ),
    "teacher.cache_draws: must be less than or equal to 255": (
        "language",
        {"teacher": {"cache_draws": 256}},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_cache_cannot_tell_or_count_is_refused(request, message):
    kind, sections = REFUSED[message]
    bench = request.getfixturevalue(kind)
    config = bench.config("refused", cache="some", **sections)

    outcome = bench.one_rank.train("--config", config, code=2)

    assert message in outcome.err
    assert not outcome.loaded


def test_a_student_learns_from_draws_and_comes_nearer_to_the_teachers_with_more(language):
    online = language.weights(language.config("online"))
    initial = language.weights(language.config("initial", train={"learning_rate": 0.0}))
    collected = []
    for draws in (1, 255):
        config = language.config(f"of-{draws}", cache=f"of-{draws}", teacher={"cache_draws": draws})
        outcome = language.cache(config)
        assert (
            f"rows of {16 * draws * 5} bytes" in outcome
        )  # 16 positions, ids of 4 bytes and counts
        collected.append(language.weights(config))

    assert all(torch.isfinite(weight).all() for weight in collected[1].values())
    few, many = (furthest(weights, online) for weights in collected)
    assert many < furthest(initial, online) / 2
    assert many < few / 2


def test_a_cache_that_another_command_fills_is_left_to_it(language):
    with written_once(language.folder / "shared"):
        refused = language.one_rank.megakd(
            "cache", language.config("second", cache="shared"), code=2
        )

    assert f"{language.folder / 'shared'} is in use by another run" in refused.err
    assert not (language.folder / "shared").exists()
    language.cache(language.config("second", cache="shared"))
    assert not (language.folder / "shared" / "lock.json").exists()


def test_a_cache_of_the_other_kind_is_refused_naming_both(language):
    best, drawn = {"cache": "of-the-best"}, {"cache": "of-draws"}
    language.cache(language.config("kept", **best))
    language.cache(language.config("drawn", **drawn, teacher=DRAWS))
    wrong: dict[str, dict[str, Any]] = {
        "top_k: 64 there, absent here; draws: absent there, 16 here": {**best, "teacher": DRAWS},
        "draws: 16 there, absent here": drawn,
        "draws: 16 there, 17 here": {**drawn, "teacher": {"cache_draws": 17}},
        "draws_seed: 0 there, 3 here": {**drawn, "teacher": {**DRAWS, "cache_seed": 3}},
    }

    for command in ("train", "cache"):
        for message, sections in wrong.items():
            config = language.config("wrong", **sections)
            assert message in language.one_rank.megakd(command, config, code=2).err
