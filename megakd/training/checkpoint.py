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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd.engine.collectives import agree, gather, on_main, together
from megakd.engine.distributed import Ranks
from megakd.errors import CheckpointError, MegakdError
from megakd.process.seeding import random_state, set_random_state
from megakd.storage.atomic import full_disk_reason, set_aside, write_text
from megakd.storage.checksums import Entries, damage_of, files_of, read_signed, write_signed
from megakd.storage.fingerprint import Fingerprint, as_read_back, differences
from megakd.training.stage_folder import is_longer, same_rows

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 4
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
    """The checkpoints of one stage in `checkpoints/<stage>`; every method is a collective.

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
        """Return the content of this rank's files by name.

        Args:
            engine: the files of the engine's state.
            states: everything else that a resumed stage needs, by name.
        """
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
        """Give a checkpoint its name once every rank has written its files.

        Args:
            step: the number of optimiser steps taken.
            write: writes this rank's files into the folder of `begin`; returns their entries.
        """
        with self._cleared_on_failure(step):
            files = entries_of_ranks(write)
            return on_main(lambda: self._publish(step, files))

    @contextmanager
    def _cleared_on_failure(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, MegakdError) as error:
            on_main(lambda: shutil.rmtree(self._partial(step), ignore_errors=True))
            raise self._could_not_write(step, error) from error

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
        """Keep the newest few checkpoints; set later ones aside, which the start did not see."""
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

    def _could_not_write(self, step: int, error: Exception) -> CheckpointError:
        newest = self.newest()
        kept = (
            f"the last good checkpoint is {newest}" if newest else "there is no earlier checkpoint"
        )
        full = full_disk_reason(error)
        cure = "free some space and start" if full else "start"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.folder}: "
            f"{full or error}; nothing else was changed, {kept}; {cure} the same command again"
        )

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

        They are all of its checkpoints if the named one is not among them. A collective.
        """
        on_main(lambda: self._begin_from(given))

    def _begin_from(self, given: Path) -> None:
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
        return next((d for d in gather(self._own_damage(checkpoint)) if d is not None), None)

    def _own_damage(self, checkpoint: Path) -> str | None:
        try:
            files = sorted(read_signed(checkpoint / MANIFEST)["files"].items())
        except (OSError, ValueError) as error:
            return f"{MANIFEST} cannot be read: {error}"
        return damage_of(checkpoint, dict(files[self.ranks.rank :: self.ranks.world_size]))

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
