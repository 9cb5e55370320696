"""Several teachers under several ranks: all draw alike, and idle ones cost their shard alone."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from equal_runs import ZERO3, difference
from tiny_runs import NO_DROPOUT, bert, config_tree, write_config, write_reviews

STEPS, MICRO_BATCHES = 6, 2
SIZES = {"small": (1, 16), "middle": (2, 16), "large": (2, 24)}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pools")
    task = {"type": "classification", "dataset": str(write_reviews(folder / "reviews"))}
    tree = config_tree(
        folder / "unused",
        task,
        student={"model": bert(1, **NO_DROPOUT)},
        teachers=[
            {"name": name, "model": bert(layers, width=width, initializer_range=0.2, **NO_DROPOUT)}
            for name, (layers, width) in SIZES.items()
        ],
        method={"name": "skdbert"},
    )
    steps = {"max_steps": STEPS, "gradient_accumulation_steps": MICRO_BATCHES}
    # Large, so that the size of a gradient shows in the step that Adam takes.
    tree["train"] |= {**steps, "adam_epsilon": 0.01}
    return str(write_config(folder / "run.yaml", tree))


@pytest.fixture
def learn(run_case, config):
    """The findings of all ranks."""

    def learned(ranks: int, *overrides: str, teacher: int = 3, case: str = "learn") -> list[dict]:
        presets = [f"teachers.{i}.deepspeed=teacher_zero{teacher}" for i in range(len(SIZES))]
        return run_case(f"pool_cases.{case}", config, ranks, *presets, *overrides)

    return learned


@pytest.mark.parametrize(
    ("method", "student", "teacher"),
    [
        ("skdbert", "zero0", 0),
        ("skdbert", "zero2", 3),
        ("mean_of_teachers", "zero3", 3),
        pytest.param("takd", "zero2", 3, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_learn_from_a_pool_as_one_does(learn, method, student, teacher):
    settings = (f"method.name={method}", f"student.deepspeed={student}")

    first, second = learn(2, *settings, teacher=teacher)
    (alone,) = learn(1, f"method.name={method}", "student.deepspeed=zero0", teacher=0)

    assert first["asked"] == second["asked"] == alone["asked"]
    assert difference(first["weights"], alone["weights"]) <= 1e-5


def test_one_draw_serves_a_step_and_every_rank_holds_its_shard_of_every_teacher(learn):
    (whole,) = learn(1, "method.name=skdbert", "student.deepspeed=zero0", teacher=0)
    ranks = learn(2)

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
def test_the_next_drawn_teacher_is_read_from_its_shards_that_were_fetched_ahead(learn, method):
    everywhere = [f"teachers.{i}.deepspeed={json.dumps(ZERO3)}" for i in range(len(SIZES))]
    settings = [f"method.name={method}", *everywhere]

    plain, ahead = learn(2, *settings)[0], learn(2, *settings, case="learn_ahead")[0]

    assert ahead["asked"] == plain["asked"]
    assert difference(ahead["weights"], plain["weights"]) == 0
    drawn = plain["asked"][::MICRO_BATCHES]
    changes = sum(before != after for before, after in itertools.pairwise(drawn))
    # The last step fetches for one that does not come.
    fetched = {"skdbert": range(changes, changes + 3), "mean_of_teachers": range(1)}
    assert ahead["fetched"] in fetched[method]


def test_two_ranks_keep_the_answers_that_one_does_and_learn_from_them(
    workers, learn, config, tmp_path
):
    def caches(where: str) -> list[str]:
        return [f"teachers.{i}.cache={tmp_path / where}-{i}" for i in range(len(SIZES))]

    def made(ranks: int, where: str) -> list[str]:
        overrides = [f"output_dir={tmp_path / 'unused'}", *caches(where)]
        return workers(ranks).run("pool_cases.cache", config, overrides)[0]

    for mine, others in zip(made(1, "one"), made(2, "two"), strict=True):
        torch.testing.assert_close(*(torch.from_numpy(np.load(f)) for f in (mine, others)))
    online = learn(2)[0]
    offline = learn(2, *caches("two"))[0]

    assert offline["asked"] == online["asked"]
    assert difference(offline["weights"], online["weights"]) <= 1e-5
