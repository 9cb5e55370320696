"""Rows that name their teachers, under several ranks with rows of different teachers."""

from __future__ import annotations

import pytest
from equal_runs import difference
from routed_bench import EXPERTS, rows
from tiny_runs import (
    NO_DROPOUT,
    SENTENCES,
    bert,
    config_tree,
    llama,
    write_config,
    write_jsonl,
    write_reviews,
)

STEPS, MICRO_BATCHES = 4, 2
SIZES = {"math": 0.2, "code": 0.4}
"""Initial ranges of the experts, which have the same layers and different weights."""


def teachers(kind, **keys) -> list[dict]:
    return [
        {"name": name, "model": kind(2, initializer_range=spread, **keys)}
        for name, spread in SIZES.items()
    ]


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("routed")
    # A few rows of code among many of math, so that most micro-batches have none.
    few = [{**row, "expert": EXPERTS[n % 7 == 6]} for n, row in enumerate(rows(28))]
    write_jsonl(write_reviews(folder / "reviews") / "train.jsonl", few)
    chat = [
        {"prompt": f"say {n}", "completion": f" {SENTENCES[n % 4]}", "expert": few[n]["expert"]}
        for n in range(28)
    ]
    tasks = {
        "classification": {"type": "classification", "dataset": str(folder / "reviews")},
        "causal_lm": {
            "type": "causal_lm",
            "train_files": str(write_jsonl(folder / "chat.jsonl", chat)),
            "validation_files": str(write_jsonl(folder / "held.jsonl", chat[:4])),
            "max_length": 24,
        },
    }
    collected = {}
    for name, task in tasks.items():
        kind, keys = (bert, NO_DROPOUT) if name == "classification" else (llama, {})
        tree = config_tree(
            folder / "unused",
            {**task, "teacher_column": "expert"},
            student={"model": kind(1, **keys)},
            teachers=teachers(kind, **keys),
            method={"name": "routed"},
            objective=[{"loss": "soft_target_kl"}, {"loss": "hard_cross_entropy", "weight": 0.3}],
        )
        if name == "classification":
            tree["objective"].append({"loss": "hidden_mse"})
        steps = {"max_steps": STEPS, "gradient_accumulation_steps": MICRO_BATCHES}
        # Large, so that the size of a gradient shows in the step that Adam takes.
        tree["train"] |= {**steps, "adam_epsilon": 0.01}
        collected[name] = str(write_config(folder / f"{name}.yaml", tree))
    return collected


@pytest.fixture
def learn(run_case, configs):
    """The findings of all ranks."""

    def learned(task: str, ranks: int, *overrides: str, teacher: int) -> list[dict]:
        presets = [f"teachers.{i}.deepspeed=teacher_zero{teacher}" for i in range(len(SIZES))]
        return run_case("pool_cases.learn", configs[task], ranks, *presets, *overrides)

    return learned


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
def test_two_ranks_learn_as_one_and_ask_the_same_teachers(learn, task, student, teacher, settings):
    first, second = learn(task, 2, f"student.deepspeed=zero{student}", *settings, teacher=teacher)
    (alone,) = learn(task, 1, "student.deepspeed=zero0", teacher=0)

    assert first["asked"] == second["asked"]
    assert {*first["asked"]} == {*EXPERTS}
    assert first["record"] == alone["record"]
    assert difference(first["weights"], alone["weights"]) < 2e-5


def test_a_teacher_of_all_rows_but_a_few_is_not_the_other_teacher(learn, configs):
    """The few rows of the other expert change the student, on both ranks."""
    (mixed,) = learn("causal_lm", 1, "student.deepspeed=zero0", teacher=0)

    (single,) = learn(
        "causal_lm",
        1,
        "method.name=single",
        "method.teacher=math",
        "task.teacher_column=null",
        teacher=0,
    )

    assert difference(mixed["weights"], single["weights"]) > 1e-4
