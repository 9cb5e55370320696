"""Students that learn from teachers' answers on disk, as a user has them made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benches import Bench, furthest
from tiny_runs import NO_DROPOUT, bert, llama, review_task, text_task, write_config
from whole_run import finish, records, weights

from megakd.run.holder import locked

VOCABULARY = 320
# Large weights: a teacher that says the same of every row would hide a wrong row.
BIG = {"width": 24, "initializer_range": 0.5}
SHARED: dict[str, Any] = {"method": {"name": "single"}, "objective": [{"loss": "soft_target_kl"}]}
SHARED |= {"train": {"max_steps": 10, "adam_epsilon": 0.01}}


class CacheBench(Bench):
    """Runs that differ in where the answers come from."""

    def config(self, out: str, method: Any = None, *, cache: str = "", **sections: Any) -> Path:
        teacher = sections.pop("teacher", {}) | (
            {"cache": str(self.folder / cache)} if cache else {}
        )
        return super().config(out, method, teacher=teacher, **sections)

    def cache(self, config: Path) -> str:
        return self.one_rank.megakd("cache", config, code=0).err

    def weights(self, config: Path) -> dict[str, torch.Tensor]:
        finish(self.one_rank, config)
        return weights(self.folder / config.stem / "final")


@pytest.fixture(scope="module")
def classes(one_rank, tmp_path_factory) -> CacheBench:
    folder = tmp_path_factory.mktemp("classes")
    roles = {"teacher": {"model": bert(2, **BIG, **NO_DROPOUT)}}
    roles |= {"student": {"model": bert(1, **NO_DROPOUT)}}
    return CacheBench(one_rank, folder, review_task(folder), **SHARED, **roles)


@pytest.fixture(scope="module")
def language(one_rank, tmp_path_factory) -> CacheBench:
    folder = tmp_path_factory.mktemp("language")
    roles = {"teacher": {"model": llama(2, **BIG)}, "student": {"model": llama(1)}}
    return CacheBench(one_rank, folder, text_task(folder), **SHARED, **roles)


# More steps than an epoch has, so that rows are read again.
LONG = {"train": {"max_steps": 20}}


@pytest.fixture(scope="module")
def online(classes) -> dict[str, torch.Tensor]:
    """What a classifier learns from its teacher."""
    return classes.weights(classes.config("online", **LONG))


def test_a_classifier_learns_from_its_cache_what_it_learns_from_the_teacher(classes, online):
    config = classes.config("offline", cache="answers", **LONG)
    classes.cache(config)

    assert furthest(classes.weights(config), online) <= 1e-5


@pytest.mark.parametrize("losses", [False, True])
def test_a_run_that_keeps_the_answers_learns_what_it_learns_from_the_teacher(
    classes, online, losses
):
    """Held-out losses, which ask the teacher, decide nothing."""
    out = f"kept-{losses}"
    config = classes.config(out, teacher={"cache": "auto"}, eval={"losses": losses}, **LONG)

    assert furthest(classes.weights(config), online) <= 1e-5

    assert (classes.folder / out / "stages" / "teacher-answers").is_dir()


def test_texts_are_evaluated_where_answers_are_kept(language):
    generation = {"max_new_tokens": 4, "prompt_tokens": 4}
    kept = {"cache": "auto", "cache_top_k": 8}
    sections = {"eval": {"generation": generation}, "train": {"max_steps": 2}}

    language.weights(language.config("texts", teacher=kept, **sections))

    keys = {key for r in records(language.folder / "texts", "student") for key in r}
    assert "eval/text_tokens" in keys, keys


@pytest.fixture(scope="module")
def taught(language) -> dict[str, torch.Tensor]:
    """What a language model learns from its teacher."""
    return language.weights(language.config("online"))


@pytest.fixture(scope="module")
def initial(language) -> dict[str, torch.Tensor]:
    return language.weights(language.config("initial", train={"learning_rate": 0.0}))


def test_a_cache_of_the_whole_vocabulary_teaches_what_the_teacher_does(language, taught):
    config = language.config("offline", cache="all", teacher={"cache_top_k": VOCABULARY})
    language.cache(config)

    # Logarithms are kept in fp16.
    assert furthest(language.weights(config), taught) <= 2e-3


def test_of_a_large_vocabulary_the_largest_are_kept_and_the_rest_is_one_more(language, initial):
    config = language.config("some", cache="some-answers", teacher={"cache_top_k": 8})

    outcome = language.cache(config)
    weights = language.weights(config)

    assert "of 768 bytes" in outcome  # 16 positions of 8 ids of 4 bytes and logarithms of 2
    assert all(torch.isfinite(weight).all() for weight in weights.values())
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
INSIDE = "method={name: knowledge_selection, policy: random_hard}; objective=null; "
INSIDE += "student.model.config.num_hidden_layers=2"
OF_DRAWS = "teacher.cache_draws=16; objective.0"
# By message: the kind of rows, and overrides of the config.
REFUSED: dict[str, tuple[str, str]] = {
    "some/cache.json does not exist; create the cache first": ("classes", "seed=1"),
    "hidden_mse needs more than outputs, which teacher.cache holds": (
        "classes",
        "objective.0.loss=hidden_mse",
    ),
    "teacher.cache holds only the outputs of the teacher": ("classes", INSIDE),
    "needs all probabilities, and teacher.cache": (
        "language",
        "objective.0.loss=soft_target_reverse_kl",
    ),
    "temperature 1, because teacher.cache holds the largest probabilities": (
        "language",
        "objective.0.temperature=2",
    ),
    "needs all probabilities, and teacher.cache holds random draws": (
        "language",
        f"{OF_DRAWS}.loss=soft_target_jsd",
    ),
    "needs temperature 1, because teacher.cache holds random draws": (
        "language",
        f"{OF_DRAWS}.temperature=2",
    ),
    "teacher.cache_draws: supported only for causal_lm, and task.type is classification": (
        "language",
        "teacher.cache_draws=16; task.type=classification",
    ),
    "teacher.cache_draws: must be less than or equal to 255": (
        "language",
        "teacher.cache_draws=256",
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_cache_cannot_tell_or_count_is_refused(request, message):
    kind, overrides = REFUSED[message]
    bench = request.getfixturevalue(kind)
    config = bench.config("refused", cache="some")

    outcome = bench.one_rank.train("--config", config, *overrides.split("; "), code=2)

    assert message in outcome.err
    assert not outcome.loaded


def test_a_student_learns_from_draws_and_comes_nearer_to_the_teachers_with_more(
    language, taught, initial
):
    collected = []
    for draws in (1, 255):
        config = language.config(f"of-{draws}", cache=f"of-{draws}", teacher={"cache_draws": draws})
        # Of 16 positions, ids of 4 bytes and counts.
        assert f"rows of {16 * draws * 5} bytes" in language.cache(config)
        collected.append(language.weights(config))

    assert all(torch.isfinite(weight).all() for weight in collected[1].values())
    few, many = (furthest(weights, taught) for weights in collected)
    assert many < furthest(initial, taught) / 2
    assert many < few / 2


def test_a_cache_that_another_command_fills_is_left_to_it(language):
    folder, config = language.folder / "shared", language.config("second", cache="shared")
    with locked(folder):
        refused = language.one_rank.megakd("cache", config, code=2)

    assert f"{folder} is in use by another run" in refused.err
    assert not folder.exists()
    language.cache(config)
    assert not (folder / "lock.json").exists()
    nothing = language.one_rank.megakd("cache", language.config("online"), code=2)
    assert "no teacher has a cache: set teacher.cache" in nothing.err


def test_a_cache_of_the_other_kind_is_refused_naming_both(language):
    best, drawn = {"cache": "of-the-best"}, {"cache": "of-draws"}
    language.cache(language.config("kept", **best))
    language.cache(language.config("drawn", **drawn, teacher=DRAWS))
    wrong: dict[str, dict[str, Any]] = {
        "top_k: 64 there, absent here; draws: absent there, 16 here": {**best, "teacher": DRAWS},
        "draws: 16 there, absent here": drawn,
        "draws: 16 there, 17 here": {**drawn, "teacher": {"cache_draws": 17}},
    }

    for command in ("train", "cache"):
        for message, sections in wrong.items():
            config = language.config("wrong", **sections)
            assert message in language.one_rank.megakd(command, config, code=2).err
