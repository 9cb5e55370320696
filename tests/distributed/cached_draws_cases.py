"""Results of gloo ranks with a cache of draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

from pool_cases import cache

from megakd.teachers import cached
from megakd.teachers.frozen import FrozenTeacher

ROWS_PER_SHARD = 8


def write(config_path: str, overrides: list[str], shard: int = ROWS_PER_SHARD) -> list[str]:
    """Write the cache in small shards, and return the files."""
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
