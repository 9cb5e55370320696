"""Several teachers under several ranks: all draw alike, and rows may name their teachers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from equal_runs import ZERO3, difference
from routed_bench import EXPERTS, rows
from tiny_runs import NO_DROPOUT, SENTENCES, bert, llama, review_task, run_in, write_jsonl

STEPS, MICRO_BATCHES = 6, 2
SIZES = {"small": (1, 16), "middle": (2, 16), "large": (2, 24)}
# Initial ranges of the experts, which have the same layers and different weights.
SPREADS = {"math": 0.2, "code": 0.4}
# A large epsilon, so that the size of a gradient shows in the step that Adam takes.
TRAIN = {"gradient_accumulation_steps": MICRO_BATCHES, "adam_epsilon": 0.01}


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pools")
    teachers = [
        {"name": name, "model": bert(layers, width=width, initializer_range=0.2, **NO_DROPOUT)}
        for name, (layers, width) in SIZES.items()
    ]
    sections = {"method": {"name": "skdbert"}, "train": {**TRAIN, "max_steps": STEPS}}
    student = {"model": bert(1, **NO_DROPOUT)}
    return str(run_in(folder, review_task(folder), student=student, teachers=teachers, **sections))


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> dict[str, str]:
    """By task: a run whose rows name one of two experts."""
    folder = tmp_path_factory.mktemp("routed")
    # A few rows of code among many of math, so that most micro-batches have none.
    few = [{**row, "expert": EXPERTS[n % 7 == 6]} for n, row in enumerate(rows(28))]
    reviews = review_task(folder)
    write_jsonl(folder / "reviews" / "train.jsonl", few)
    chat = [
        {"prompt": f"say {n}", "completion": f" {SENTENCES[n % 4]}", "expert": few[n]["expert"]}
        for n in range(28)
    ]
    conversations = {
        "type": "causal_lm",
        "train_files": str(write_jsonl(folder / "chat.jsonl", chat)),
        "validation_files": str(write_jsonl(folder / "held.jsonl", chat[:4])),
        "max_length": 24,
    }

    def written(task, model, objective, **keys) -> str:
        teachers = [
            {"name": name, "model": model(2, initializer_range=spread, **keys)}
            for name, spread in SPREADS.items()
        ]
        sections = {"method": {"name": "routed"}, "objective": objective, "train": TRAIN}
        student, named = {"model": model(1, **keys)}, {**task, "teacher_column": "expert"}
        path = folder / task["type"]
        return str(run_in(path, named, student=student, teachers=teachers, **sections))

    both = [{"loss": "soft_target_kl"}, {"loss": "hard_cross_entropy", "weight": 0.3}]
    return {
        "classification": written(reviews, bert, [*both, {"loss": "hidden_mse"}], **NO_DROPOUT),
        "causal_lm": written(conversations, llama, both),
    }


@pytest.fixture
def learn(run_case):
    """The findings of all ranks, with teachers at a ZeRO stage."""

    def learned(config: str, ranks: int, *overrides: str, teacher=3, case="learn") -> list[dict]:
        count = len(json.loads(Path(config).read_text())["teachers"])
        presets = [f"teachers.{i}.deepspeed=teacher_zero{teacher}" for i in range(count)]
        return run_case(f"pool_cases.{case}", config, ranks, *presets, *overrides)

    return learned


@pytest.mark.parametrize(
    ("method", "student", "teacher"),
    [
        ("skdbert", "zero0", 0),
        ("skdbert", "zero2", 3),
        ("mean_of_teachers", "zero3", 3),
    ],
)
def test_two_ranks_learn_from_a_pool_as_one_does(learn, pool, method, student, teacher):
    settings = (f"method.name={method}", f"student.deepspeed={student}")

    first, second = learn(pool, 2, *settings, teacher=teacher)
    (alone,) = learn(pool, 1, f"method.name={method}", "student.deepspeed=zero0", teacher=0)

    assert first["asked"] == second["asked"] == alone["asked"]
    assert difference(first["weights"], alone["weights"]) <= 1e-5


def test_one_draw_serves_a_step_and_every_rank_holds_its_shard_of_every_teacher(learn, pool):
    (whole,) = learn(pool, 1, "method.name=skdbert", "student.deepspeed=zero0", teacher=0)
    ranks = learn(pool, 2)

    asked = ranks[0]["asked"]
    assert len(asked) == STEPS * MICRO_BATCHES
    drawn = [asked[i : i + MICRO_BATCHES] for i in range(0, len(asked), MICRO_BATCHES)]
    assert all(len(set(step)) == 1 for step in drawn)
    assert len({step[0] for step in drawn}) > 1
    for name, elements in whole["held"].items():
        shares = [rank["held"][name] for rank in ranks]
        assert shares[0] == shares[1]
        # Every weight's halves are padded to the same length.
        assert elements / 2 <= shares[0] < elements / 2 + 100


@pytest.mark.parametrize("method", ["skdbert", "mean_of_teachers"])
def test_the_next_drawn_teacher_is_read_from_its_shards_that_were_fetched_ahead(
    learn, pool, method
):
    everywhere = [f"teachers.{i}.deepspeed={json.dumps(ZERO3)}" for i in range(len(SIZES))]
    settings = [f"method.name={method}", *everywhere]

    plain, ahead = learn(pool, 2, *settings)[0], learn(pool, 2, *settings, case="learn_ahead")[0]

    assert ahead["asked"] == plain["asked"]
    assert difference(ahead["weights"], plain["weights"]) == 0
    drawn = plain["asked"][::MICRO_BATCHES]
    changes = sum(before != after for before, after in itertools.pairwise(drawn))
    # The last step fetches for one that does not come.
    fetched = {"skdbert": range(changes, changes + 3), "mean_of_teachers": range(1)}
    assert ahead["fetched"] in fetched[method]


def test_two_ranks_keep_the_answers_that_one_does_and_learn_from_them(
    workers, learn, pool, tmp_path
):
    def caches(where: str) -> list[str]:
        return [f"teachers.{i}.cache={tmp_path / where}-{i}" for i in range(len(SIZES))]

    def made(ranks: int, where: str) -> list[str]:
        overrides = [f"output_dir={tmp_path / 'unused'}", *caches(where)]
        return workers(ranks).run("pool_cases.cache", pool, overrides)[0]

    for mine, others in zip(made(1, "one"), made(2, "two"), strict=True):
        torch.testing.assert_close(*(torch.from_numpy(np.load(f)) for f in (mine, others)))
    online = learn(pool, 2)[0]
    offline = learn(pool, 2, *caches("two"))[0]

    assert offline["asked"] == online["asked"]
    assert difference(offline["weights"], online["weights"]) <= 1e-5


@pytest.mark.parametrize(
    ("task", "student", "teacher", "settings"),
    [
        ("classification", 0, 0, ()),
        ("classification", 3, 3, ()),
        ("causal_lm", 0, 3, ()),
        ("causal_lm", 3, 3, ()),
        ("causal_lm", 3, 3, ("train.tokens_per_rank=40",)),
        pytest.param("causal_lm", 2, 0, ("train.tokens_per_rank=40",), marks=pytest.mark.slow),
    ],
)
def test_two_ranks_learn_as_one_and_ask_the_same_teachers(
    learn, routed, task, student, teacher, settings
):
    first, second = learn(
        routed[task], 2, f"student.deepspeed=zero{student}", *settings, teacher=teacher
    )
    (alone,) = learn(routed[task], 1, "student.deepspeed=zero0", teacher=0)

    assert first["asked"] == second["asked"]
    assert {*first["asked"]} == {*EXPERTS}
    assert first["record"] == alone["record"]
    assert difference(first["weights"], alone["weights"]) < 2e-5


def test_a_teacher_of_all_rows_but_a_few_is_not_the_other_teacher(learn, routed):
    """The few rows of the other expert change the student, on both ranks."""
    (mixed,) = learn(routed["causal_lm"], 1, "student.deepspeed=zero0", teacher=0)

    one = ("method.name=single", "method.teacher=math", "task.teacher_column=null")
    (single,) = learn(routed["causal_lm"], 1, *one, teacher=0)

    assert difference(mixed["weights"], single["weights"]) > 1e-4
