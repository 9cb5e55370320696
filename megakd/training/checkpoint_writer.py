"""Checkpoints that are written while the training goes on.

Every rank copies its state, takes the next steps, and writes the copy in a thread. The ranks tell
in the sums of a step whether they still write, see `StepVotes`; the checkpoint gets its name after
the first step in which none did. A run that is killed before goes on from the checkpoint before.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from megakd.engine.collectives import gather, node_name
from megakd.engine.memory import free_memory_bytes
from megakd.storage.checksums import Entries, write_files
from megakd.training.checkpoint import Checkpoints, CheckpointState

logger = logging.getLogger(__name__)


class _Pending(NamedTuple):
    step: int
    written: Future[Entries]


class CheckpointWriter:
    """Writes the checkpoints of a stage; methods are collectives, but for `close`.

    beside: whether to write while the training goes on; "auto": if every node has memory for its
        copy twice.
    """

    def __init__(self, checkpoints: Checkpoints, *, beside: bool | Literal["auto"]) -> None:
        self._checkpoints, self._beside = checkpoints, beside
        self.folder = checkpoints.folder
        self._pending: _Pending | None = None

    @property
    def is_pending(self) -> bool:
        """True on all ranks while a checkpoint has no name yet."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """True while this rank writes; no collective."""
        return self._pending is not None and not self._pending.written.done()

    def save(
        self,
        step: int,
        engine: Mapping[str, Any],
        states: Mapping[str, CheckpointState],
        *,
        is_last: bool,
    ) -> None:
        """Begin to write a checkpoint, see `Checkpoints.contents`; with `is_last`, also end."""
        self.publish()
        contents = self._checkpoints.contents(engine, states)
        if not is_last and self._beside == "auto":
            self._beside = _fits(contents)
        folder = self._checkpoints.begin(step)
        if is_last or not self._beside:
            self._checkpoints.publish(step, lambda: write_files(folder, contents))
            return
        # On the host: the next step changes the values on the device.
        copy = tree_map_only(Tensor, lambda value: value.to("cpu", copy=True), contents)
        self._pending = _Pending(step, _begun(lambda: write_files(folder, copy)))

    def publish(self) -> None:
        """Give the checkpoint that is being written its name; wait until it is written."""
        if self._pending is not None:
            (step, written), self._pending = self._pending, None
            self._checkpoints.publish(step, written.result)

    def close(self) -> None:
        """Wait until this rank writes no more, and leave the checkpoint without a name."""
        if self._pending is not None:
            wait([self._pending.written])


def _fits(contents: Mapping[str, Any]) -> bool:
    """Return whether every node could hold the contents of its ranks twice; a collective."""
    leaves = [value for value in tree_leaves(contents) if isinstance(value, Tensor)]
    size = sum(value.nbytes for value in leaves)
    needed, free = Counter[str](), dict[str, int]()
    for node, its, available in gather((node_name(), size, _free())):
        needed[node] += 2 * its
        free[node] = min(available, free.get(node, available))
    lacking = [node for node in needed if needed[node] > free[node]]
    if lacking:
        logger.info(
            "saves stop the training, because %s has %.1f GB of free memory, and %.1f GB are "
            "twice the state of its ranks (save.asynchronous)",
            *(lacking[0], free[lacking[0]] / 1e9, needed[lacking[0]] / 1e9),
        )
    return not lacking


def _free() -> int:
    return free_memory_bytes(torch.device("cpu"))


def _begun(action: Callable[[], Entries]) -> Future[Entries]:
    """Run an action in a thread that an interpreter does not wait for when it ends."""
    future: Future[Entries] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
