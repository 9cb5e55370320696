"""Several teachers, and their cached answers, under several ranks: all draw alike."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from benches import EXPERTS
from benches import expert_rows as rows
from cases import lab_of, local
from equal_runs import ZERO3, difference
from safetensors.torch import load_file
from slow_cases import slow
from tiny_runs import (
    NO_DROPOUT,
    SENTENCES,
    bert,
    llama,
    review_task,
    run_in,
    text_task,
    write_jsonl,
)

from megakd.engine import sharding
from megakd.engine.sharding import Prefetch
from megakd.methods import run_method
from megakd.teachers import cached
from megakd.teachers.cached import CachedTeacher


class Watched:
    """A teacher that notes its name whenever it is asked."""

    def __init__(self, name: str, teacher, asked: list[str]) -> None:
        self.name, self.teacher, self.asked = name, teacher, asked

    def __call__(self, batch):
        self.asked.append(self.name)
        return self.teacher(batch)

    def __getattr__(self, name: str):
        return getattr(self.teacher, name)

    def answers(self, batches):
        return map(self, batches)


def learned(config_path: str, overrides: list[str]) -> dict:
    """Runs the method: who was asked in which order, what each teacher held, and the student."""
    asked: list[str] = []
    held: dict[str, int] = {}
    with lab_of(config_path, overrides) as lab:
        frozen = lab.work.pool.open

        def watched(name, stage):
            teacher = frozen(name, stage)
            if not isinstance(teacher, CachedTeacher):
                held[name] = sum(local(weight).numel() for weight in teacher.model.parameters())
            return Watched(name, teacher, asked)

        lab.work.pool.open = watched
        result = run_method(lab.config.method, lab)
    weights = load_file(result.folder / "model.safetensors")
    return {"asked": asked, "held": held, "weights": weights, "record": lab.record.pool}


def cache(config_path: str, overrides: list[str]) -> list[str]:
    """Makes the caches of a config's teachers: what rank 0 wrote, and how each is listed."""
    with lab_of(config_path, overrides) as lab:
        folders = [lab.work.cache(lab.teacher(name)) for name in lab.config.teacher_specs]
    return [str(file) for folder in folders for file in sorted(folder.glob("*/*.npy"))]


class Emptied(Prefetch):
    """Tensors on the host are invalid while their copies are on the device."""

    started = 0

    def start(self) -> None:
        if not self._host:
            super().start()
            Emptied.started += 1
            self.kept = [host.clone() for host in self._host]
            for host in self._host:
                host.fill_(torch.nan)

    def drop(self) -> None:
        if self._host:
            for host, kept in zip(self._host, self.kept, strict=True):
                host.copy_(kept)
        super().drop()


def learned_ahead(config_path: str, overrides: list[str]) -> dict:
    """`learned`, as if the device were another place than the host's memory."""
    Emptied.started = 0
    away = mock.patch.object(sharding, "is_away", return_value=True)
    emptied = mock.patch("megakd.teachers.frozen.Prefetch", Emptied)
    with away, emptied:
        return learned(config_path, overrides) | {"fetched": Emptied.started}


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
    """What all ranks have seen, with the student and the teachers at ZeRO stages."""

    def run(config: str, ranks: int, *overrides: str, student=0, teacher=0, case="learned"):
        count = len(json.loads(Path(config).read_text())["teachers"])
        presets = [f"teachers.{i}.deepspeed=teacher_zero{teacher}" for i in range(count)]
        presets += [f"student.deepspeed=zero{student}"]
        return run_case(f"test_pools.{case}", config, ranks, *presets, *overrides)

    return run


@pytest.mark.parametrize(
    ("method", "student", "teacher"),
    [("skdbert", 2, 3), *slow(("skdbert", 0, 0), ("mean_of_teachers", 3, 3))],
)
def test_two_ranks_learn_from_a_pool_as_one_does(learn, pool, method, student, teacher):
    settings = [f"method.name={method}"]

    first, second = learn(pool, 2, *settings, student=student, teacher=teacher)
    (alone,) = learn(pool, 1, *settings)

    assert first["asked"] == second["asked"] == alone["asked"]
    assert difference(first["weights"], alone["weights"]) <= 1e-5


def test_one_draw_serves_a_step_and_every_rank_holds_its_shard_of_every_teacher(learn, pool):
    (whole,) = learn(pool, 1, "method.name=skdbert")
    ranks = learn(pool, 2, "method.name=skdbert", student=2, teacher=3)

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


@pytest.mark.parametrize("method", ["skdbert", *slow("mean_of_teachers")])
def test_the_next_drawn_teacher_is_read_from_its_shards_that_were_fetched_ahead(
    learn, pool, method
):
    everywhere = [f"teachers.{i}.deepspeed={json.dumps(ZERO3)}" for i in range(len(SIZES))]
    settings = [f"method.name={method}", *everywhere]

    plain, ahead = (learn(pool, 2, *settings, case=c)[0] for c in ("learned", "learned_ahead"))

    assert ahead["asked"] == plain["asked"]
    assert difference(ahead["weights"], plain["weights"]) == 0
    drawn = plain["asked"][::MICRO_BATCHES]
    changes = sum(before != after for before, after in itertools.pairwise(drawn))
    # The last step fetches for one that does not come.
    fetched = {"skdbert": range(changes, changes + 3), "mean_of_teachers": range(1)}
    assert ahead["fetched"] in fetched[method]


@pytest.mark.slow
def test_two_ranks_keep_the_answers_that_one_does_and_learn_from_them(
    workers, learn, pool, tmp_path
):
    def caches(where: str) -> list[str]:
        return [f"teachers.{i}.cache={tmp_path / where}-{i}" for i in range(len(SIZES))]

    def files(ranks: int, where: str) -> list[str]:
        overrides = [f"output_dir={tmp_path / 'unused'}", *caches(where)]
        return workers(ranks).run("test_pools.cache", pool, overrides)[0]

    for mine, others in zip(files(1, "one"), files(2, "two"), strict=True):
        torch.testing.assert_close(*(torch.from_numpy(np.load(f)) for f in (mine, others)))
    online = learn(pool, 2, teacher=3)[0]
    offline = learn(pool, 2, *caches("two"), teacher=3)[0]

    assert offline["asked"] == online["asked"]
    assert difference(offline["weights"], online["weights"]) <= 1e-5


PACKED = ("train.tokens_per_rank=40",)
SLOW = [("classification", 0, 0, ()), ("classification", 3, 3, ()), ("causal_lm", 0, 3, ())]
SLOW += [("causal_lm", 3, 3, ()), ("causal_lm", 2, 0, PACKED)]


@pytest.mark.parametrize(
    ("task", "student", "teacher", "settings"), [("causal_lm", 3, 3, PACKED), *slow(*SLOW)]
)
def test_two_ranks_learn_as_one_and_ask_the_same_teachers(
    learn, routed, task, student, teacher, settings
):
    first, second = learn(routed[task], 2, *settings, student=student, teacher=teacher)
    (alone,) = learn(routed[task], 1)

    assert first["asked"] == second["asked"]
    assert {*first["asked"]} == {*EXPERTS}
    assert first["record"] == alone["record"]
    assert difference(first["weights"], alone["weights"]) < 2e-5


def test_a_teacher_of_all_rows_but_a_few_is_not_the_other_teacher(learn, routed):
    """The few rows of the other expert change the student."""
    (mixed,) = learn(routed["causal_lm"], 1)

    one = ("method.name=single", "method.teacher=math", "task.teacher_column=null")
    (single,) = learn(routed["causal_lm"], 1, *one)

    assert difference(mixed["weights"], single["weights"]) > 1e-4


# The cache of draws of a teacher.


def write_shards(config_path: str, overrides: list[str], rows: int) -> list[str]:
    with mock.patch.object(cached, "SHARD_ROWS", rows):
        return cache(config_path, overrides)


@pytest.fixture(scope="module")
def drawing(tmp_path_factory) -> str:
    """A run whose teacher keeps draws."""
    folder = tmp_path_factory.mktemp("draws")
    teacher = {"model": llama(2, width=24, initializer_range=0.5), "cache_draws": 6}
    sections = {"method": {"name": "single"}, "objective": [{"loss": "soft_target_kl"}]}
    train = {"max_steps": 6, "adam_epsilon": 0.01}
    return str(run_in(folder, text_task(folder), teacher=teacher, train=train, **sections))


@pytest.fixture(scope="module")
def write(workers, drawing, tmp_path_factory):
    def written(*, ranks: int, rows: int, teacher=0, shard=8, folder: Path | None = None) -> Path:
        folder = folder or tmp_path_factory.mktemp("cache") / "cache"
        settings = [
            f"output_dir={folder.parent / 'unused'}",
            f"teacher.cache={folder}",
            f"teacher.deepspeed=teacher_zero{teacher}",
            f"eval.per_device_eval_batch_size={rows}",
        ]
        workers(ranks).run("test_pools.write_shards", drawing, settings, shard)
        return folder

    return written


@pytest.fixture(scope="module")
def by_one_rank(write) -> Path:
    return write(ranks=1, rows=8)


def draws(folder: Path) -> dict[str, np.ndarray]:
    files = {kind: sorted(folder.glob(f"*/{kind}.npy")) for kind in ("ids", "counts")}
    return {kind: np.concatenate([np.load(one) for one in each]) for kind, each in files.items()}


def test_neither_ranks_nor_batches_nor_shards_nor_a_kill_change_the_draws(write, by_one_rank):
    other = write(ranks=2, rows=3, teacher=3, shard=5)

    np.testing.assert_equal(draws(other), draws(by_one_rank))
    for shard in sorted(other.glob("*/ids.npy"))[3:]:  # what a kill leaves
        shutil.rmtree(shard.parent)
    write(ranks=1, rows=4, shard=5, folder=other)
    np.testing.assert_equal(draws(other), draws(by_one_rank))


@pytest.mark.parametrize("stage", [*slow(2), 3])
def test_two_ranks_learn_from_draws_as_one_does(run_case, by_one_rank, drawing, stage):
    one, two = (
        run_case(
            "test_pools.learned",
            drawing,
            ranks,
            f"teacher.cache={by_one_rank}",
            f"student.deepspeed=zero{zero}",
        )[0]["weights"]
        for ranks, zero in ((1, 0), (2, stage))
    )

    assert difference(two, one) <= 1e-5
