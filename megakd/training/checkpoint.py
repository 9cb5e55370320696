"""Checkpoints that are written completely or not at all, and verified before they are used.

    checkpoints/<stage>/step-<n>/    engine-<r>.pt, rank-<r>.pt, state.pt, manifest.json
    checkpoints/<stage>/latest       the name of the newest, replaced last
    checkpoints/<stage>/begun_from   the checkpoint that the user named, if the stage began there
    checkpoints/<stage>/step-<n>.unused-<k>/    a checkpoint that the run does not go on from

A checkpoint is written under another name and renamed when every file is on the disk and its
checksum is in the manifest. A kill at any moment leaves the previous checkpoint untouched.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from megakd.engine.collectives import agree, gather, node_name, on_main, together
from megakd.engine.distributed import Ranks
from megakd.engine.memory import free_memory_bytes
from megakd.errors import CheckpointError, MegakdError
from megakd.process.seeding import random_state, set_random_state
from megakd.storage.atomic import full_disk_reason, set_aside, write_text
from megakd.storage.checksums import (
    Entries,
    damage_of,
    files_of,
    read_signed,
    write_files,
    write_signed,
)
from megakd.storage.fingerprint import Fingerprint, as_read_back, differences
from megakd.training.stage_folder import is_longer, same_rows

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 5
"""Increased when the content of checkpoints changes, so that older ones are refused in one line."""
LATEST, BEGUN_FROM = "latest", "begun_from"
_STATES = "state.pt"
_PARTIAL = ".partial"
_PREFIX = "step-"
_NAME = re.compile(_PREFIX + r"\d+")


class CheckpointState(NamedTuple):
    """A part of the state of a stage, as plain values and tensors; `save` may be a collective."""

    save: Callable[[], Any]
    load: Callable[[Any], None]


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one stage in `checkpoints/<stage>`.

    Every method is a collective unless it says otherwise.

    fingerprint: what the run depends on; a checkpoint with another fingerprint is refused.
    keep: the number of checkpoints to keep; None keeps all, also those of a finished stage.
    may_grow: whether the checkpoint of a shorter run may be continued, see `is_longer`.
    """

    folder: Path
    fingerprint: Fingerprint
    keep: int | None
    ranks: Ranks
    may_grow: bool = False

    def contents(
        self, engine: Mapping[str, Any], states: Mapping[str, CheckpointState]
    ) -> dict[str, Any]:
        """Return the content of this rank's files by name; `engine`: those of the engine."""
        stored = {name: state.save() for name, state in states.items()}
        contents = {**engine, _random_file(self.ranks.rank): random_state()}
        if self.ranks.is_main:
            contents[_STATES] = stored
        check_plain(contents)
        return contents

    def begin(self, step: int) -> Path:
        """Return an empty folder for the files of a checkpoint, which is not published yet."""
        partial = self._partial(step)
        with self._cleared_on_failure(step):
            on_main(lambda: self._make_room(partial))
        return partial

    def publish(self, step: int, write: Callable[[], Entries]) -> Path:
        """Give a checkpoint its name once every rank has written its files into that of `begin`."""
        with self._cleared_on_failure(step):
            files = entries_of_ranks(write)
            return on_main(lambda: self._publish(step, files))

    @contextmanager
    def _cleared_on_failure(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, MegakdError) as error:
            on_main(lambda: shutil.rmtree(self._partial(step), ignore_errors=True))
            newest, full = self.newest(), full_disk_reason(error)
            kept = "there is no earlier checkpoint"
            if newest:
                kept = f"the last good checkpoint is {newest}"
            cure = "free some space and start" if full else "start"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: "
                f"{full or error}; nothing else was changed, {kept}; {cure} the same command again"
            ) from error

    def _partial(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step}{_PARTIAL}"

    def _make_room(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{_PREFIX}*{_PARTIAL}"):
            shutil.rmtree(leftover)
        newest = self.newest()
        needed = sum((newest / name).stat().st_size for name in files_of(newest)) if newest else 0
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            lacking = f"{needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
            raise OSError(errno.ENOSPC, f"no space left on the device: {lacking}")
        partial.mkdir()

    def _publish(self, step: int, files: Entries) -> Path:
        partial, final = self._partial(step), self.folder / f"{_PREFIX}{step}"
        manifest = {
            "format": FORMAT,
            "stage": self.folder.name,
            "step": step,
            "ranks": self.ranks.world_size,
            "fingerprint": self.fingerprint,
            "files": files,
        }
        write_signed(partial / MANIFEST, manifest)
        if final.exists():
            set_aside(final)
        partial.rename(final)
        write_text(self.folder / LATEST, final.name)
        self._remove_old(final)
        return final

    def _remove_old(self, newest: Path) -> None:
        # Later ones, which the start did not see, are set aside.
        every = self._by_age()
        current = every.index(newest)
        limit = len(every) if self.keep is None else current + self.keep
        for old in [*every[:current], *every[limit:]]:
            try:
                (set_aside if old in every[:current] else shutil.rmtree)(old)
            except OSError as error:  # the new checkpoint is good, so the run continues
                logger.warning("%s could not be removed: %s", old, error)

    def finish(self) -> None:
        """Remove what no later start reads once the stage's model is written; call on rank 0.

        A longer run continues from the newest checkpoint and the best weights.
        """
        if self.keep is None:
            return
        newest = self.newest() if self.may_grow else None
        for old in [self.folder] if newest is None else self._by_age():
            if old != newest:
                shutil.rmtree(old, ignore_errors=True)

    def _by_age(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        folders = [f for f in self.folder.iterdir() if _NAME.fullmatch(f.name) and f.is_dir()]
        return sorted(folders, key=_step_of, reverse=True)

    def newest(self) -> Path | None:
        """Return the checkpoint that `latest` names, or else the newest checkpoint."""
        return next((c for c in self._newest_first() if c.is_dir()), None)

    def to_resume(self, wanted: bool | str) -> Path | None:  # noqa: FBT001 - a value of the config
        """Return the verified checkpoint that `resume_from_checkpoint` asks for, or None.

        A named checkpoint is begun from once: the same command then goes on from the stage's own.
        """
        given = Path(wanted) if isinstance(wanted, str) else None
        begun = given is not None and on_main(lambda: has_begun_from(self.folder, given))
        checkpoint = self.newest_good() if begun else None
        if checkpoint is None and given is not None:
            checkpoint = self.given(given)
        checkpoint = checkpoint or self.newest_good()
        if checkpoint is not None and wanted is False:
            raise CheckpointError(
                f"{checkpoint} exists and resume_from_checkpoint is false; use another output_dir, "
                f"remove {self.folder}, or set resume_from_checkpoint to true"
            )
        return checkpoint

    def begin_from(self, given: Path) -> None:
        """Note that the stage goes on from a named checkpoint; set aside its later checkpoints.

        They are all of its checkpoints if the named one is not among them. Call on rank 0.
        """
        there, every = given.resolve(), self._by_age()
        # Not a copy in this folder, nor a checkpoint that was set aside.
        listed = next((checkpoint for checkpoint in every if checkpoint.resolve() == there), None)
        for checkpoint in every:
            if listed is None or _step_of(checkpoint) > _step_of(listed):
                set_aside(checkpoint)
        self.folder.mkdir(parents=True, exist_ok=True)
        if listed is None:
            (self.folder / LATEST).unlink(missing_ok=True)
        else:
            write_text(self.folder / LATEST, listed.name)
        write_text(self.folder / BEGUN_FROM, str(there))

    def newest_good(self) -> Path | None:
        """Return the newest undamaged checkpoint of this run; None if the stage has none yet.

        If every checkpoint is damaged, shared storage may show files late: that is an error.
        """
        damages: dict[Path, str] = {}
        for candidate in agree(self._newest_first()):
            damage = self.damage(candidate)
            if damage is None:
                self._check_origin(candidate)
                on_main(partial(_pass_over, damages, candidate))
                return candidate
            damages[candidate] = f"{candidate} is damaged ({damage})"
        if damages:
            raise CheckpointError(
                f"no checkpoint of the stage can be used: {'; '.join(damages.values())}; nothing "
                "was changed. If the files are on shared storage, start the same command again "
                f"when they are visible; to train the stage from its start, move {self.folder} away"
            )
        return None

    def before(self, step: int) -> Path | None:
        """Return the newest undamaged checkpoint of an earlier step; set later ones aside."""
        passed: dict[Path, str] = {}
        for candidate in agree(self._by_age()):
            if _step_of(candidate) < step and self.damage(candidate) is None:
                on_main(partial(_pass_over, passed, candidate))
                return candidate
            passed[candidate] = f"{candidate} needs the weights of step {step}, which are damaged"
        return None

    def _newest_first(self) -> list[Path]:
        """Return the checkpoints; the checkpoint that `latest` names is first, even if missing."""
        every, pointer = self._by_age(), self.folder / LATEST
        name = pointer.read_text("utf-8", errors="replace").strip() if pointer.is_file() else ""
        named = [self.folder / name] if _NAME.fullmatch(name) else []
        return [*named, *(checkpoint for checkpoint in every if checkpoint not in named)]

    def damage(self, checkpoint: Path) -> str | None:
        """Return the damage to a checkpoint's files, or None; a collective."""
        try:
            files = sorted(read_signed(checkpoint / MANIFEST)["files"].items())
        except (OSError, ValueError) as error:
            mine = f"{MANIFEST} cannot be read: {error}"
        else:
            share = dict(files[self.ranks.rank :: self.ranks.world_size])
            mine = damage_of(checkpoint, share)
        return next((damage for damage in gather(mine) if damage is not None), None)

    def _check_origin(self, checkpoint: Path) -> None:
        manifest = read_signed(checkpoint / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise _of_another_version(checkpoint)
        here = as_read_back(self.fingerprint)
        there = manifest["fingerprint"]
        differing = differences(there, here)
        if differing and not (self.may_grow and is_longer(there, here)):
            raise CheckpointError(
                f"{checkpoint} was written with another config ({differing}); use another "
                f"output_dir, use that config again{same_rows(there, here)}, or remove "
                f"{checkpoint.parent}, and the stage begins anew"
            )

    def has_grown(self, checkpoint: Path) -> bool:
        """Return true if this run has more steps than the run of a checkpoint; a collective."""
        there = on_main(lambda: read_signed(checkpoint / MANIFEST)["fingerprint"])
        return is_longer(there, as_read_back(self.fingerprint))

    def load(
        self,
        checkpoint: Path,
        read_engine: Callable[[Path], None],
        states: Mapping[str, CheckpointState],
    ) -> int:
        """Load the engine and the states in their order; return how many ranks wrote them.

        Random numbers continue if the number of ranks is the same.
        """
        read_engine(checkpoint)
        ranks, device = read_signed(checkpoint / MANIFEST)["ranks"], self.ranks.device
        stored = read_states(checkpoint, device)
        for name, state in states.items():
            state.load(stored[name])
        # Last, because reading the engine may draw random numbers.
        if ranks == self.ranks.world_size:
            set_random_state(_read_plain(checkpoint / _random_file(self.ranks.rank), device))
        return ranks

    def given(self, checkpoint: Path) -> Path | None:
        """Verify a checkpoint that the user named; return None if it belongs to another stage."""
        # Rank 0 decides; `damage` finds a rank that lacks the files.
        if on_main(lambda: self._stage_of(checkpoint)) != self.folder.name:
            return None
        damage = self.damage(checkpoint)
        if damage is not None:
            raise CheckpointError(f"{checkpoint} cannot be resumed from: {damage}")
        self._check_origin(checkpoint)
        return checkpoint

    def _stage_of(self, checkpoint: Path) -> str:
        # One that was removed after its stage had begun there is missed by this stage alone.
        if not checkpoint.is_dir() and not has_begun_from(self.folder, checkpoint):
            return checkpoint.resolve().parent.name
        try:
            return read_signed(checkpoint / MANIFEST)["stage"]
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint} cannot be resumed from: {MANIFEST} cannot be read: {error}; give a "
                f"folder such as checkpoints/<stage>/step-<n>, or true for the newest"
            ) from error


class CheckpointWriter:
    """Writes the checkpoints of a stage; methods are collectives, but for `close`.

    Every rank copies its state, takes the next steps, and writes the copy in a thread. The ranks
    vote in a step whether they still write (`StepVotes`); the checkpoint gets its name after the
    first step in which none did. A run that is killed before goes on from the one before.

    beside: whether to write while the training goes on; "auto": if every node has memory for its
        copy twice.
    """

    def __init__(self, checkpoints: Checkpoints, *, beside: bool | Literal["auto"]) -> None:
        self._checkpoints, self._beside = checkpoints, beside
        self.folder = checkpoints.folder
        self._pending: tuple[int, Future[Entries]] | None = None

    @property
    def is_pending(self) -> bool:
        """True on all ranks while a checkpoint has no name yet."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """True while this rank writes; no collective."""
        return self._pending is not None and not self._pending[1].done()

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
        self._pending = step, _begun(lambda: write_files(folder, copy))

    def publish(self) -> None:
        """Give the checkpoint that is being written its name; wait until it is written."""
        if self._pending is not None:
            (step, written), self._pending = self._pending, None
            self._checkpoints.publish(step, written.result)

    def close(self) -> None:
        """Wait until this rank writes no more, and leave the checkpoint without a name."""
        if self._pending is not None:
            wait([self._pending[1]])


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


def has_begun_from(folder: Path, given: Path) -> bool:
    """Return whether a stage has gone on from a checkpoint that the user named."""
    note = folder / BEGUN_FROM
    return note.is_file() and note.read_text("utf-8", errors="replace") == str(given.resolve())


def read_states(checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """Return the states of a checkpoint by name."""
    return _read_plain(checkpoint / _STATES, device)


def entries_of_ranks(write: Callable[[], Entries]) -> Entries:
    """Write files on all ranks; return all their entries; a collective.

    The folder is not listed: on shared storage a rank may not see the files of another rank yet.
    """
    return {name: entry for share in gather(together(write)) for name, entry in share.items()}


def _random_file(rank: int) -> str:
    return f"rank-{rank}.pt"


def _pass_over(damages: Mapping[Path, str], used: Path) -> None:
    for checkpoint, damage in damages.items():
        aside = f", renamed to {set_aside(checkpoint)}" if checkpoint.is_dir() else ""
        logger.warning("%s%s: using %s", damage, aside, used)
    if damages:
        write_text(used.with_name(LATEST), used.name)


def oldest_step(folder: Path) -> int:
    """Return the step of the oldest checkpoint in `checkpoints/<stage>`; 0 if there is none."""
    folders = (path for path in folder.glob(f"{_PREFIX}*") if _NAME.fullmatch(path.name))
    return min(map(_step_of, folders), default=0)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


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
