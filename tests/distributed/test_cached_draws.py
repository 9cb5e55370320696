"""A cache of draws is the same for any number of ranks, for any batches, and after a kill."""

from __future__ import annotations

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


def write_until(config_path: str, overrides: list[str], calls: int) -> None:
    """Write the cache until the teacher has answered some micro-batches."""
    draw, left = FrozenTeacher.draw, [None] * calls

    def ending(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return draw(*arguments)

    with (
        mock.patch.object(FrozenTeacher, "draw", ending),
        pytest.raises(KeyboardInterrupt),
    ):
        write_shards(config_path, overrides)


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


def draws(folder: Path) -> dict[str, np.ndarray]:
    """The rows of all shards."""
    files = {kind: sorted(folder.glob(f"*/{kind}.npy")) for kind in ("ids", "counts")}
    return {kind: np.concatenate([np.load(one) for one in each]) for kind, each in files.items()}


@pytest.fixture(scope="module")
def alone(write) -> Path:
    return write(ranks=1, rows=8)


@pytest.mark.parametrize(
    ("ranks", "rows", "teacher", "shard"), [(1, 3, 0, 5), (2, 2, 0, 8), (2, 3, 3, 8)]
)
def test_ranks_batches_and_shards_do_not_change_the_draws(
    write, alone, ranks, rows, teacher, shard
):
    made = write(ranks=ranks, rows=rows, teacher=teacher, shard=shard)

    np.testing.assert_equal(draws(made), draws(alone))


def test_a_cache_that_is_gone_on_with_after_a_kill_has_the_same_files(write, alone):
    partly = write(ranks=2, rows=2, calls=5)
    shards = len(list(partly.glob("*/ids.npy")))

    whole = write(ranks=1, rows=5, folder=partly)

    ours, theirs = (
        {str(file.relative_to(at)): file.read_bytes() for file in at.glob("*/*")}
        for at in (whole, alone)
    )
    assert 0 < shards < len(list(alone.glob("*/ids.npy")))
    assert ours == theirs
    np.testing.assert_equal(draws(whole), draws(alone))


def test_two_ranks_learn_from_draws_as_one_does(run_case, alone, config):
    def learned(ranks: int, stage: str) -> dict:
        settings = (f"teacher.cache={alone}", f"student.deepspeed={stage}")
        return run_case("pool_cases.learn", config, ranks, *settings)[0]["weights"]

    expected = learned(1, "zero0")
    for stage in ("zero2", "zero3"):
        assert difference(learned(2, stage), expected) <= 1e-5
