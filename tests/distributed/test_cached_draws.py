"""A cache of draws is the same for any number of ranks, for any batches, and after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from equal_runs import difference
from pool_cases import cache
from tiny_runs import llama, run_in, write_text

from megakd.teachers import cached
from megakd.teachers.frozen import FrozenTeacher

ROWS_PER_SHARD = 8


def write_shards(config_path: str, overrides: list[str], shard: int = ROWS_PER_SHARD) -> list[str]:
    with mock.patch.object(cached, "SHARD_ROWS", shard):
        return cache(config_path, overrides)


def write_until(config_path: str, overrides: list[str], calls: int) -> int:
    """Write the cache until the teacher has answered some micro-batches; return the shards."""
    with (
        mock.patch.object(FrozenTeacher, "draw", _ending(FrozenTeacher.draw, calls)),
        mock.patch.object(cached, "SHARD_ROWS", ROWS_PER_SHARD),
    ):
        try:
            cache(config_path, overrides)
        except KeyboardInterrupt:
            folder = next(o for o in overrides if ".cache=" in o).partition("=")[2]
            return len(list(Path(folder).glob("*/ids.npy")))
    raise AssertionError("the cache was complete before it was to end")


def _ending(draw: Callable, calls: int) -> Callable:
    left = [calls]

    def ending(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return draw(*arguments)

    return ending


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("draws")
    text = str(write_text(folder / "text.txt"))
    tokenizer = {"type": "bpe", "vocab_size": 320}
    config = run_in(
        folder,
        {"type": "causal_lm", "dataset": text, "tokenizer": tokenizer},
        teacher={"model": llama(2, width=24, initializer_range=0.5), "cache_draws": 6},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl"}],
        train={"max_steps": 6, "adam_epsilon": 0.01},
    )
    return str(config)


@pytest.fixture(scope="module")
def write(workers, config, tmp_path_factory):
    """Write a cache with some ranks and rows per call, in shards of 8 rows.

    calls: end after so many calls. shard: rows per shard.
    """

    def written(*, ranks: int, rows: int, teacher: int = 0, folder: Path | None = None, **more):
        folder = folder or tmp_path_factory.mktemp("cache") / "cache"
        settings = [
            f"output_dir={folder.parent / 'unused'}",
            f"teacher.cache={folder}",
            f"teacher.deepspeed=teacher_zero{teacher}",
            f"eval.per_device_eval_batch_size={rows}",
        ]
        case = "write_until" if "calls" in more else "write_shards"
        workers(ranks).run(f"test_cached_draws.{case}", config, settings, **more)
        return folder

    return written


def contents(folder: Path) -> dict[str, np.ndarray]:
    return {str(file.relative_to(folder)): np.load(file) for file in folder.glob("*/*.npy")}


def assert_same(actual: Path, expected: Path) -> None:
    mine, theirs = contents(actual), contents(expected)
    assert mine.keys() == theirs.keys()
    assert len(mine) > 2  # several shards of two files
    for name, values in theirs.items():
        np.testing.assert_array_equal(mine[name], values, err_msg=name)
    listed = [json.loads((f / "cache.json").read_text())["shards"] for f in (actual, expected)]
    assert listed[0] == listed[1]


@pytest.fixture(scope="module")
def alone(write) -> Path:
    return write(ranks=1, rows=8)


@pytest.mark.parametrize(("ranks", "rows", "teacher"), [(1, 3, 0), (2, 2, 0), (2, 3, 3)])
def test_ranks_and_batches_do_not_change_the_draws(write, alone, ranks, rows, teacher):
    assert_same(write(ranks=ranks, rows=rows, teacher=teacher), alone)


def test_a_cache_that_is_gone_on_with_after_a_kill_has_the_same_files(write, alone):
    partly = write(ranks=2, rows=2, calls=5)
    shards = len(contents(partly)) // 2

    whole = write(ranks=1, rows=5, folder=partly)

    assert 0 < shards < len(contents(whole)) // 2
    assert_same(whole, alone)


def test_the_number_of_the_row_decides_and_not_its_place_in_a_shard(write, alone):
    caches = [contents(cache) for cache in (write(ranks=1, rows=8, shard=5), alone)]

    for kind in ("ids", "counts"):
        actual, expected = (
            np.concatenate([values for name, values in sorted(cache.items()) if kind in name])
            for cache in caches
        )
        np.testing.assert_array_equal(actual, expected)


def test_two_ranks_learn_from_draws_as_one_does(workers, write, alone, config, tmp_path):
    def learned(ranks: int, stage: str) -> dict:
        settings = [
            f"output_dir={tmp_path / stage}",
            f"teacher.cache={alone}",
            f"train.per_device_train_batch_size={4 // ranks}",
            f"student.deepspeed={stage}",
        ]
        return workers(ranks).run("pool_cases.learn", config, settings)[0]["weights"]

    expected = learned(1, "zero0")
    for stage in ("zero2", "zero3"):
        assert difference(learned(2, stage), expected) <= 1e-5
