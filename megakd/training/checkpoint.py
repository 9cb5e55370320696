"""Checkpoints of a stage, saved, loaded and removed.

    checkpoints/<stage>/step-<n>/    engine-<r>.pt, rank-<r>.pt, state.pt, checksums.json

A checkpoint is written under another name and renamed when every file is on the disk and its
checksum is in the manifest. A kill at any moment leaves the earlier checkpoints untouched. The
newest complete one is the one that a run goes on from.
"""

from __future__ import annotations

import errno
import logging
import pickle
import re
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from megakd.engine.collectives import gather, node_name, on_main, raise_on_all
from megakd.engine.distributed import Ranks
from megakd.engine.memory import free_memory_bytes
from megakd.errors import CheckpointError, MegakdError
from megakd.process.files import full_disk_reason
from megakd.process.record import FORMAT
from megakd.process.seals import Entries, damage_of, entries, files_of, write_files, write_manifest
from megakd.process.seeding import random_state, set_random_state
from megakd.training.stage_folder import Length, is_longer

logger = logging.getLogger(__name__)

_STATES, _ABOUT = "state.pt", "checkpoint"

PARTIAL = ".partial"
"""Ends the name of a checkpoint that is being written."""


class Stateful(Protocol):
    """A part of a stage with a state of plain values and tensors; both may be collectives."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@dataclass(kw_only=True)
class Checkpoints:
    """The checkpoints of one stage in `checkpoints/<stage>`.

    Every method is a collective unless it says otherwise.

    keep: the number of checkpoints to keep; None keeps all, also those of a finished stage.
    length: of the stage. may_grow: whether a checkpoint of fewer steps may be continued.
    stays: whether the newest checkpoint stays when the stage has finished, if it may grow.
    beside: whether to write while the training goes on; "auto": if every node has memory for its
        copy twice.
    """

    folder: Path
    keep: int | None
    ranks: Ranks
    length: Length = field(default_factory=dict)
    may_grow: bool = False
    stays: bool = False
    beside: bool | Literal["auto"] = False
    _pending: tuple[int, Future[Entries]] | None = None

    def save(
        self,
        step: int,
        engine: Mapping[str, Any],
        states: Mapping[str, Stateful],
        *,
        is_last: bool,
    ) -> None:
        """Write a checkpoint; beside the next steps if `beside` and not `is_last`.

        Every rank then copies its state, takes the next steps, and writes the copy in a thread. The
        ranks vote in a step whether they still write (`StepVotes`); the checkpoint gets its name
        after the first step in which none did. A run that is killed before goes on from the
        checkpoint before.

        engine: content of this rank's files of the engine, by name.
        """
        self.publish()
        contents = {**engine, _random_file(self.ranks.rank): random_state()}
        stored = {name: state.state_dict() for name, state in states.items()}
        about = {"format": FORMAT, "stage": self.folder.name, "step": step}
        about |= {"ranks": self.ranks.world_size, "length": dict(self.length)}
        if self.ranks.is_main:
            contents[_STATES] = {**stored, _ABOUT: about}
        check_plain(contents)
        if not is_last and self.beside == "auto":
            self.beside = _fits(contents)
        partial = self.folder / f"step-{step}{PARTIAL}"
        with self._cleared_on_failure(step):
            on_main(lambda: self._make_room(partial))
        if is_last or not self.beside:
            self._publish(step, lambda: write_files(partial, contents))
            return
        # On the host: the next step changes the values on the device.
        copy = tree_map_only(Tensor, lambda value: value.to("cpu", copy=True), contents)
        self._pending = step, _begun(lambda: write_files(partial, copy))

    def _make_room(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"step-*{PARTIAL}"):
            shutil.rmtree(leftover)
        newest = self.newest()
        needed = sum((newest / name).stat().st_size for name in files_of(newest)) if newest else 0
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            lacking = f"{needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
            raise OSError(errno.ENOSPC, f"no space left on the device: {lacking}")
        partial.mkdir()

    @contextmanager
    def _cleared_on_failure(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, MegakdError) as error:
            partial = self.folder / f"step-{step}{PARTIAL}"
            on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
            newest, full = self.newest(), full_disk_reason(error)
            left = f"the last good checkpoint is {newest}" if newest else "there is no earlier one"
            cure = "free some space and start" if full else "start"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: "
                f"{full or error}; nothing else was changed, {left}; {cure} the same command again"
            ) from error

    def publish(self) -> None:
        """Give the checkpoint that is being written its name; wait until it is written."""
        if self._pending is not None:
            (step, written), self._pending = self._pending, None
            self._publish(step, written.result)

    def _publish(self, step: int, write: Callable[[], Entries]) -> None:
        partial, final = (self.folder / f"step-{step}{end}" for end in (PARTIAL, ""))

        def publish() -> None:
            write_manifest(partial, files)
            partial.rename(final)
            self._remove_old()

        with self._cleared_on_failure(step):
            # On shared storage a rank may not see the files of another rank yet.
            files = {
                name: entry for of in gather(raise_on_all(write)) for name, entry in of.items()
            }
            on_main(publish)
        logger.info("the checkpoint of step %d in %s is whole", step, self.folder)

    def _remove_old(self) -> None:
        for step in steps_in(self.folder)[: -self.keep] if self.keep else []:
            try:
                shutil.rmtree(self.folder / f"step-{step}")
            except OSError as error:  # the new checkpoint is good, so the run continues
                logger.warning("step %d in %s could not be removed: %s", step, self.folder, error)

    @property
    def is_pending(self) -> bool:
        """True on all ranks while a checkpoint has no name yet."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """True while this rank writes; no collective."""
        return self._pending is not None and not self._pending[1].done()

    def close(self) -> None:
        """Wait until this rank writes no more, and leave the checkpoint without a name."""
        if self._pending is not None:
            wait([self._pending[1]])

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint; no collective."""
        steps = steps_in(self.folder)
        return self.folder / f"step-{steps[-1]}" if steps else None

    def to_resume(self) -> Path | None:
        """Return the newest checkpoint after it was verified; None if the stage has none yet.

        Raises:
            CheckpointError: it is damaged, or of another version, stage or length.
        """
        checkpoint = on_main(self.newest)
        if checkpoint is None:
            return None
        damage = self.damage(checkpoint)
        if damage is not None:
            raise CheckpointError(
                f"{checkpoint} is damaged: {damage}; if its files are on shared storage, start "
                f"again when they are visible; else remove {checkpoint}, and the stage goes on "
                "from the checkpoint before it, or from its start"
            )
        about = read_states(checkpoint, torch.device("cpu")).get(_ABOUT, {})
        if (about.get("format"), about.get("stage")) != (FORMAT, self.folder.name):
            raise _of_another_version(checkpoint)
        is_longer(about["length"], self.length, may_grow=self.may_grow, where=checkpoint)
        return checkpoint

    def damage(self, checkpoint: Path) -> str | None:
        """Return the damage to a checkpoint's files, or None; every rank reads its share."""
        try:
            files = sorted(entries(checkpoint).items())
        except (OSError, ValueError) as error:
            damage = f"its manifest cannot be read: {error}"
        else:
            share = dict(files[self.ranks.rank :: self.ranks.world_size])
            damage = damage_of(checkpoint, share)
        return next((reason for reason in gather(damage) if reason is not None), None)

    def load(
        self,
        checkpoint: Path,
        read_engine: Callable[[Path], None],
        states: Mapping[str, Stateful],
    ) -> tuple[int, bool]:
        """Load the engine and the states in their order.

        Random numbers continue if the number of ranks is the same.

        Returns:
            How many ranks wrote the checkpoint, and whether the stage has more steps now.
        """
        read_engine(checkpoint)
        stored = read_states(checkpoint, self.ranks.device)
        about = stored.pop(_ABOUT)
        for name, state in states.items():
            state.load_state_dict(stored[name])
        # Last, because reading the engine may draw random numbers.
        if about["ranks"] == self.ranks.world_size:
            random = _read_plain(checkpoint / _random_file(self.ranks.rank), self.ranks.device)
            set_random_state(random)
        grown = is_longer(about["length"], self.length, may_grow=self.may_grow, where=checkpoint)
        return about["ranks"], grown

    def finish(self) -> None:
        """Remove what no later start reads once the stage's model is written; call on rank 0.

        A longer run continues from the newest checkpoint and the best weights.
        """
        if self.keep is None:
            return
        if not (self.may_grow and self.stays):
            shutil.rmtree(self.folder, ignore_errors=True)
        for step in steps_in(self.folder)[:-1]:
            shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)


def steps_in(folder: Path, *, ending: str = "") -> list[int]:
    """Return the steps of the folders `step-<n><ending>` in a folder, in ascending order."""
    names = (re.fullmatch(rf"step-(\d+){re.escape(ending)}", p.name) for p in folder.glob("step-*"))
    return sorted(int(match[1]) for match in names if match)


def read_states(checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """Return the states of a checkpoint by name."""
    return _read_plain(checkpoint / _STATES, device)


def _random_file(rank: int) -> str:
    return f"rank-{rank}.pt"


def _fits(contents: Mapping[str, Any]) -> bool:
    # Whether every node could hold the contents of its ranks twice.
    leaves = [value for value in tree_leaves(contents) if isinstance(value, Tensor)]
    size = sum(value.nbytes for value in leaves)
    needed, free = Counter[str](), dict[str, int]()
    mine = node_name(), size, free_memory_bytes(torch.device("cpu"))
    for node, its, available in gather(mine):
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


def _begun(action: Callable[[], Entries]) -> Future[Entries]:
    # In a thread that an interpreter does not wait for when it ends.
    future: Future[Entries] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def check_plain(state: Any, key: str = "state") -> None:
    """Raise TypeError if a state holds an object of a class, because a pickle names its file.

    Every later version reads plain values, even if the code of a strategy has moved.
    """
    if type(state) in (list, tuple):
        for index, value in enumerate(state):
            check_plain(value, f"{key}[{index}]")
    elif type(state) in (dict, OrderedDict):
        for name, value in state.items():
            check_plain(name, f"a name in {key}")
            check_plain(value, f"{key}[{name!r}]")
    elif state is not None and type(state) not in (str, bytes, int, float, bool, Tensor):
        raise TypeError(
            f"{key} is a {type(state).__name__}: a checkpoint holds tensors, numbers, strings, "
            f"lists, tuples and dicts; give its plain values in state_dict()"
        )


def _read_plain(path: Path, device: torch.device) -> dict[str, Any]:
    # Values that `check_plain` has accepted; those of any GPU go to `device`.
    def place(storage: Any, at: str) -> Any:
        return storage if at == "cpu" else storage.to(device=device)

    try:
        return torch.load(path, map_location=place, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _of_another_version(path.parent) from error


def _of_another_version(checkpoint: Path) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint} was written by another version of megakd and cannot be read by this "
        f"version; remove the folder {checkpoint.parent} to train this stage again, or use the "
        "version that wrote the checkpoint"
    )
