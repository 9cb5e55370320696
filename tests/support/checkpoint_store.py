"""A stage's checkpoints without an engine, for tests of what is on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megakd.engine.distributed import Ranks
from megakd.training.checkpoint import Checkpoints

ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
SHARD = "shard.pt"
ENGINE = {SHARD: {"weight": torch.arange(1000.0)}}
FILES = (SHARD, "state.pt", "rank-0.pt")


def checkpoints(
    folder: Path, *, keep: int | None = 2, ranks: Ranks = ALONE, **fields: Any
) -> Checkpoints:
    return Checkpoints(folder=folder / "student", keep=keep, ranks=ranks, **fields)


def save(store: Checkpoints, *steps: int, values: dict[str, Any] | None = None) -> Path:
    """Save without an engine; return the last checkpoint."""
    for step in steps:
        states = states_of(values or {"step": step, "window": step * 10})
        store.save(step, ENGINE, states, is_last=True)
    newest = store.newest()
    assert newest is not None
    return newest


class Value:
    """A state that is one of some values."""

    def __init__(self, values: dict[str, Any], name: str) -> None:
        self._values, self._name = values, name

    def state_dict(self) -> Any:
        return self._values[self._name]

    def load_state_dict(self, state: Any) -> None:
        self._values[self._name] = state


def states_of(values: dict[str, Any]) -> dict[str, Value]:
    """States that are saved as these values, and that put what is loaded back into them."""
    return {name: Value(values, name) for name in values}


def load(store: Checkpoints, folder: Path, read_engine: Any = None) -> dict[str, Any]:
    """Return what the states of a checkpoint of `save` are loaded with."""
    values: dict[str, Any] = {"step": None, "window": None}
    store.load(folder, read_engine or read_nothing, states_of(values))
    return values


def names(store: Checkpoints) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def read_nothing(folder: Path) -> None:
    del folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
