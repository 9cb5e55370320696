"""Checkpoints of a stage, saved, loaded and removed, and what evaluations decide.

    checkpoints/<stage>/step-<n>/    engine-<r>.pt, rank-<r>.pt, state.pt, checksums.json

A checkpoint is written under another name and renamed when every file is on the disk and its
checksum is in the manifest. A kill at any moment leaves the earlier checkpoints untouched. The
newest complete one is the one that a run goes on from.

    checkpoints/<stage>/best/step-<n>/           the best of all evaluations
    checkpoints/<stage>/best-<view>/step-<n>/    the best evaluation of a view

To a checkpoint of step c belong the newest weights up to c. They stay while the checkpoint stays:
a run that goes on from it may not find a later evaluation again. Of a student with adapters, a
folder holds the adapters alone.
"""

from __future__ import annotations

import errno
import logging
import math
import pickle
import re
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from megakd.engine.collectives import gather, node_name, on_main, together
from megakd.engine.distributed import Ranks
from megakd.engine.memory import free_memory_bytes
from megakd.errors import CheckpointError, MegakdError
from megakd.models.views import Cut, UnitOrder, View
from megakd.process.files import (
    FORMAT,
    Entries,
    damage,
    damage_of,
    entries,
    files_of,
    full_disk_reason,
    write_files,
    write_manifest,
)
from megakd.process.seeding import random_state, set_random_state
from megakd.stage import Scores, Verdict
from megakd.training.ranking import WHOLE
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
            files = {name: entry for of in gather(together(write)) for name, entry in of.items()}
            on_main(publish)

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


_BEST = "best"


class Evaluation(NamedTuple):
    """The scores of all views of a model, or of the model itself, and the view that is kept.

    cut: how the model is cut when it is written; None if `view` defines the cut.
    """

    scores: Scores
    view: str | None
    cut: Cut | None = None

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the view that is kept."""
        return {} if self.view is None else self.scores[self.view]

    def scalars(self) -> dict[str, float]:
        """Return the values for the log: the kept metrics, and every view's metrics by name."""
        named = {
            f"eval/{view}/{name}": value
            for view, values in self.scores.items()
            for name, value in values.items()
            if view != WHOLE
        }
        return named | {f"eval/{name}": value for name, value in self.metrics.items()}

    def record(self) -> dict[str, Any]:
        """Return the evaluation as plain values, which a checkpoint stores."""
        scores = {view: dict(values) for view, values in self.scores.items()}
        cut = self.cut and [part and tuple(part) for part in self.cut]
        return {"view": self.view, "scores": scores, "cut": cut}

    @staticmethod
    def read(record: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation of a `record`."""
        order, view = record["cut"] or (None, None)
        cut = record["cut"] and Cut(order and UnitOrder(*order), view and View(*view))
        return Evaluation(record["scores"], record["view"], cut)


class Best:
    """What the evaluations of a stage decide: the weights that it returns, and an early end.

    folder: of the stage's checkpoints.
    write: writes the learner's weights of an evaluation into a folder; a collective.
    views: those whose own best evaluation the judge may ask for.
    keeps: whether the weights of the best evaluation are returned, or those of the last step.
    patience: the number of evaluations without a better score that ends the stage; None: none does.
    misses: the number of such evaluations in a row.
    """

    def __init__(
        self,
        folder: Path,
        write: Callable[[Path, Evaluation], None],
        views: Sequence[str] = (),
        *,
        keeps: bool = True,
        patience: int | None = None,
    ) -> None:
        self._folder, self._write, self._keeps = folder, write, keeps
        self._patience, self.misses = patience, 0
        self._latest = Evaluation({}, None)
        self._score: float | None = None
        names = (_BEST, *(f"{_BEST}-{view}" for view in views))
        self._best: dict[str, dict[str, Any] | None] = dict.fromkeys(names)

    @property
    def is_stale(self) -> bool:
        return self._patience is not None and self.misses >= self._patience

    def extend(self) -> None:
        """Let a stage that has stopped continue, because it has more steps now."""
        if self.is_stale:
            self.misses = 0

    def consider(self, step: int, evaluation: Evaluation, verdict: Verdict) -> None:
        """Write the learner's weights wherever no earlier evaluation was as good; a collective.

        A higher score is better, a tie keeps the earlier weights, and NaN never wins.
        """
        self._latest = evaluation
        if verdict.counts:
            self._count(verdict.score)
        if not self._keeps:
            return
        self._consider(_BEST, step, verdict.score, evaluation)
        for view, score in verdict.of_views.items():
            self._consider(f"{_BEST}-{view}", step, score, Evaluation(evaluation.scores, view))

    def _count(self, score: float) -> None:
        if not math.isnan(score) and (self._score is None or score > self._score):
            self._score, self.misses = score, 0
        else:
            self.misses += 1

    def _consider(self, name: str, step: int, score: float, evaluation: Evaluation) -> None:
        best = self._best[name]
        if math.isnan(score) or (best is not None and not score > best["score"]):
            return
        self._write(self._folder / name / f"step-{step}", evaluation)
        self._best[name] = {"step": step, "score": float(score), "evaluation": evaluation.record()}
        on_main(lambda: self._remove_others(name, step))

    def _remove_others(self, name: str, newest: int) -> None:
        written = steps_in(self._folder / name)
        saved = [*steps_in(self._folder), *steps_in(self._folder, ending=PARTIAL)]
        needed = {max((s for s in written if s <= c), default=newest) for c in saved} | {newest}
        for step in {*written} - needed:
            shutil.rmtree(self._folder / name / f"step-{step}", ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the steps, scores and evaluations of the best weights."""
        counts = {"latest": self._latest.record(), "score": self._score, "misses": self.misses}
        return {**counts, "weights": dict(self._best)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the weights that a checkpoint names, and remove later ones; a collective.

        Raises:
            CheckpointError: the weights are missing or damaged.
        """
        self._latest = Evaluation.read(state["latest"])
        self._score, self.misses = state["score"], state["misses"]
        self._best = {name: state["weights"].get(name) for name in self._best}
        on_main(self._check)

    def forget(self) -> None:
        """Remove all weights, which are of a start without a checkpoint; a collective."""
        on_main(self._check)

    def _check(self) -> None:
        for name, best in self._best.items():
            last = -1 if best is None else best["step"]
            for step in steps_in(self._folder / name):
                if step > last:  # the run finds such an evaluation again, or another one
                    shutil.rmtree(self._folder / name / f"step-{step}", ignore_errors=True)
            folder = self._folder / name / f"step-{last}"
            if best is not None and (reason := damage(folder)) is not None:
                raise CheckpointError(
                    f"{folder} is damaged: {reason}, and the newest checkpoint needs these "
                    f"weights; remove {self._folder} to train the stage again"
                )

    def returned(self) -> tuple[Path | None, Evaluation, Evaluation]:
        """Return the folder of the weights that the stage returns; None if the learner has them.

        With it: the evaluation that chose the view, whose scores compare the views with each other;
        and that of the weights, which is the view's own best, if it has one.
        """
        name, best = _BEST, self._best[_BEST]
        if best is None:
            return None, self._latest, self._latest
        chosen = evaluation = Evaluation.read(best["evaluation"])
        if of_view := self._best.get(f"{_BEST}-{chosen.view}"):
            name, best = f"{_BEST}-{chosen.view}", of_view
            evaluation = Evaluation.read(of_view["evaluation"])
        if evaluation.metrics != self._latest.metrics:  # which the last line of the log shows
            logger.info("%s: returns the best evaluation, step %d", self._folder.name, best["step"])
        return self._folder / name / f"step-{best['step']}", chosen, evaluation
