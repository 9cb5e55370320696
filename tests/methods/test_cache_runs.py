"""Students that learn from teachers' answers on disk, as a user has them made."""

from __future__ import annotations

import json

import pytest
import torch
from cache_bench import VOCABULARY, Bench, furthest
from tiny_runs import NO_DROPOUT, bert, write_config
from whole_run import finish


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


def test_a_cache_of_the_whole_vocabulary_teaches_what_the_teacher_does(language):
    online = language.weights(language.config("online"))
    config = language.config("offline", cache="all", teacher={"cache_top_k": VOCABULARY})
    language.cache(config)

    # Logarithms are kept in fp16.
    assert furthest(language.weights(config), online) <= 2e-3


def test_of_a_large_vocabulary_the_largest_are_kept_and_the_rest_is_one_more(language):
    config = language.config("some", cache="some-answers", teacher={"cache_top_k": 8})

    said = language.cache(config)
    weights = language.weights(config)

    assert "of 768 bytes" in said  # 16 positions of 8 ids of 4 bytes and logarithms of 2
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    initial = language.weights(language.config("none", train={"learning_rate": 0.0}))
    assert furthest(weights, initial) > 1e-3


def test_a_cache_of_other_texts_or_another_teacher_is_refused(classes):
    config = classes.config("first", cache="first-answers")
    classes.cache(config)
    shorter = classes.config("shorter", cache="first-answers", task={"max_length": 8})
    other = {"model": bert(3, width=24, **NO_DROPOUT)}
    larger = classes.config("larger", cache="first-answers", teacher=other)

    said = [classes.one_rank.train("--config", path) for path in (shorter, larger)]

    assert [one.code for one in said] == [2, 2]
    assert (
        "first-answers holds the cache of another teacher, other data or another setting "
        "(max_length: " in said[0].err
    )
    assert "teacher.config.num_hidden_layers: 2 there, 3 here" in said[1].err


def test_a_cache_serves_other_seeds_and_other_choices_of_labels_and_held_out_rows(classes):
    classes.weights(classes.config("learned"))
    stored = {"model": str(classes.folder / "learned" / "final")}
    kept = {"labelled_examples": 20, "max_eval_examples": 4}
    classes.cache(classes.config("some", cache="kept-answers", task=kept, teacher=stored))
    fewer = {"labelled_examples": 10, "max_eval_examples": 3}

    again = classes.config("again", cache="kept-answers", task=fewer, teacher=stored, seed=9)
    said = classes.one_rank.train("--config", again)

    assert said.code == 0, said.err


def test_a_teacher_of_random_weights_is_another_with_another_seed(classes):
    classes.cache(classes.config("drawn", cache="drawn-answers"))

    said = classes.one_rank.train(
        "--config", classes.config("drawn-anew", cache="drawn-answers", seed=9)
    )

    assert said.code == 2
    assert "seed: 42 there, 9 here" in said.err


def test_a_cache_that_was_not_made_is_asked_for(classes):
    said = classes.one_rank.train("--config", classes.config("early", cache="nowhere"))

    assert said.code == 2
    assert "nowhere/cache.json does not exist; create the cache first" in said.err


def test_a_config_without_a_cache_has_nothing_to_make(classes):
    said = classes.one_rank.megakd("cache", classes.config("online-again"))

    assert said.code == 2
    assert "no teacher has a cache: set teacher.cache" in said.err


def test_every_teacher_of_a_pool_has_its_own_cache(classes):
    names = ("a", "b")
    pool = [
        {"name": n, "model": bert(1 + i, **NO_DROPOUT), "cache": str(classes.folder / f"of-{n}")}
        for i, n in enumerate(names)
    ]
    tree = json.loads(classes.config("pool").read_text())
    del tree["teacher"]
    tree |= {"teachers": pool, "method": {"name": "skdbert"}}
    config = write_config(classes.folder / "pool.yaml", tree)

    classes.cache(config)
    finish(classes.one_rank, config)

    assert all((classes.folder / f"of-{name}" / "cache.json").is_file() for name in names)


@pytest.mark.parametrize(
    ("kind", "sections", "message"),
    [
        (
            "classes",
            {"objective": [{"loss": "hidden_mse"}]},
            "hidden_mse needs more than the outputs of the teacher",
        ),
        ("classes", {"task": {"type": "mlm"}}, "task.type mlm masks other tokens in every epoch"),
        (
            "classes",
            {"method": {"name": "knowledge_selection"}},
            'method "knowledge_selection" needs more than the outputs of the teacher',
        ),
        (
            "language",
            {"objective": [{"loss": "soft_target_reverse_kl"}]},
            "needs all probabilities of the teacher",
        ),
        (
            "language",
            {"objective": [{"loss": "soft_target_kl", "temperature": 2.0}]},
            "holds only the largest probabilities, at temperature 1",
        ),
    ],
)
def test_what_a_cache_cannot_tell_is_refused(request, kind, sections, message):
    bench = request.getfixturevalue(kind)

    said = bench.one_rank.train("--config", bench.config("refused", cache="some", **sections))

    assert said.code == 2
    assert message in said.err


def test_kinds_that_look_inside_cannot_be_weighed_from_a_cache(classes):
    """The method's own losses, which no objective in the config has named."""
    random = {"name": "knowledge_selection", "policy": "random_hard"}
    deep = {"model": classes.make(2, **NO_DROPOUT)}  # a flow needs two layers
    config = classes.config(
        "inside", cache="inside-answers", method=random, objective=None, student=deep
    )
    classes.cache(config)

    said = classes.one_rank.train("--config", config)

    assert said.code == 2
    assert "teacher.cache holds only the outputs of the teacher" in said.err
