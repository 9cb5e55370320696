"""Caches of a teacher's answers to all training rows, computed once and read from disk.

A cache is a folder. `cache.json` holds the fingerprint of the answers and lists the shards with
their checksums. A shard is a folder of numpy files, written whole or not at all. For classifiers
and regressors a shard holds logits in fp32. For language models a shard holds the k most likely
ids of every position with their log-probabilities; the loss derives the remaining probability. Or
a shard holds the ids of random draws with their counts.
"""

from __future__ import annotations

import bisect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from typing_extensions import override

from megakd.contract.batch import Batch, Draws, Knowledge, TopK
from megakd.contract.stage import Teacher
from megakd.engine.collectives import gather, on_main, together
from megakd.engine.distributed import Ranks
from megakd.errors import TeacherError
from megakd.storage import atomic
from megakd.storage.fingerprint import Fingerprint, differences
from megakd.storage.folders import (
    Entries,
    damage_of,
    entries_of,
    files_of,
    read_signed,
    write_signed,
)

if TYPE_CHECKING:
    from megakd.teachers.frozen import FrozenTeacher

logger = logging.getLogger(__name__)
MANIFEST = "cache.json"
VERSION = 2
SHARD_ROWS = 4096
SHARD_BYTES = 256 << 20
Answers = Mapping[str, Tensor]
"""Answers to some rows: `logits` [B, C]; `ids` and `logprobs` [B, T, k]; or `ids` and `counts`."""


class AnswerShard(NamedTuple):
    """A range of consecutive rows: the first row, the number of rows, and the files' checksums."""

    name: str
    start: int
    rows: int
    files: Entries


class Layout(NamedTuple):
    """Size of the answer to one row: bytes, and the mean number of tokens."""

    row_bytes: int
    tokens_per_row: float

    def rows_per_shard(self) -> int:
        """Return the rows per shard: few, so that a killed process loses little work."""
        return max(1, min(SHARD_ROWS, SHARD_BYTES // self.row_bytes))


def build_cache(
    folder: Path,
    facts: Fingerprint,
    rows: Dataset,
    *,
    ranks: Ranks,
    layout: Layout,
    asking: Callable[[], AbstractContextManager[Callable[[Dataset, int], Answers]]],
) -> None:
    """Write the answers to all rows that no undamaged shard holds; a collective.

    Args:
        asking: context manager that loads the teacher and returns a function from rows and the
            number of the first row to answers; entered only if answers are missing. The answers
            are the same on every rank.
    """
    shards = on_main(
        lambda: _read_manifest(folder, facts)[0] if (folder / MANIFEST).is_file() else []
    )
    shards = _whole_shards(folder, shards, ranks)
    logger.info(
        "%s: %d rows of %d bytes (%.1f bytes per token), %.1f MB in %d shards; %d rows are "
        "already cached",
        *(folder, len(rows), layout.row_bytes, layout.row_bytes / max(layout.tokens_per_row, 1)),
        *(len(rows) * layout.row_bytes / 1e6, -(-len(rows) // layout.rows_per_shard())),
        sum(shard.rows for shard in shards),
    )
    missing = list(_missing(shards, len(rows), layout.rows_per_shard()))
    if not missing:
        return
    with asking() as answer:
        for numbers in missing:
            part = answer(rows.select(numbers), numbers.start)
            shards.append(on_main(partial(_write, folder, numbers.start, part)))
            on_main(lambda: _record(folder, facts, shards, total=len(rows)))
            done = sum(shard.rows for shard in shards)
            logger.info("%s: %d of %d rows", folder, done, len(rows))


def _whole_shards(folder: Path, shards: Sequence[AnswerShard], ranks: Ranks) -> list[AnswerShard]:
    mine = shards[ranks.rank :: ranks.world_size]
    reasons = together(lambda: {s.name: damage_of(folder / s.name, s.files) for s in mine})
    reason_of = {name: reason for share in gather(reasons) for name, reason in share.items()}
    for name, reason in reason_of.items():
        if reason:
            logger.warning("%s is damaged (%s): its rows are computed again", folder / name, reason)
    return [shard for shard in shards if not reason_of[shard.name]]


def _missing(shards: Sequence[AnswerShard], total: int, step: int) -> Iterator[range]:
    first = 0
    ends = [(s.start, s.start + s.rows) for s in sorted(shards, key=attrgetter("start"))]
    for start, stop in [*ends, (total, total)]:
        for number in range(first, start, step):
            yield range(number, min(number + step, start))
        first = stop


def _write(folder: Path, start: int, part: Answers) -> AnswerShard:
    name = f"{start:010d}"
    with atomic.replaced_folder(folder / name) as made:
        for key, tensor in part.items():
            np.save(made / f"{key}.npy", tensor.numpy())
    count = len(next(iter(part.values())))
    return AnswerShard(name, start, count, entries_of(folder / name, files_of(folder / name)))


def _record(folder: Path, facts: Fingerprint, shards: Sequence[AnswerShard], *, total: int) -> None:
    listed = [shard._asdict() for shard in sorted(shards, key=attrgetter("start"))]
    tree = {"version": VERSION, "rows": total, "facts": facts, "shards": listed}
    write_signed(folder / MANIFEST, tree)


def _read_manifest(folder: Path, facts: Fingerprint) -> tuple[list[AnswerShard], int]:
    path = folder / MANIFEST
    try:
        tree = read_signed(path)
        shards = [AnswerShard(**shard) for shard in tree["shards"]]
        there, rows, version = tree["facts"], int(tree["rows"]), tree["version"]
    except FileNotFoundError as error:
        raise TeacherError(
            f"{path} does not exist; create the cache first: launch/cache_teacher.py --config F"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TeacherError(
            f"{path} is damaged or of an earlier version ({error}); remove {folder} and create the "
            "cache again: launch/cache_teacher.py --config F"
        ) from error
    here = json.loads(json.dumps(facts))
    differing = differences({"version": version, **there}, {"version": VERSION, **here})
    if differing:
        raise TeacherError(
            f"{folder} holds the cache of another teacher, other data or another setting "
            f"({differing}); set the teacher's cache to another folder, or remove this folder and "
            "create the cache again"
        )
    return shards, rows


class CachedTeacher(Teacher):
    """A teacher that answers micro-batches of training rows from a cache.

    model: answers other rows than those of steps; None: all rows are rows of the cache.
    """

    model: FrozenTeacher | None = None

    def __init__(self, folder: Path, facts: Fingerprint, ranks: Ranks) -> None:
        shards, rows = on_main(lambda: _read_manifest(folder, facts))
        held = sum(shard.rows for shard in shards)
        if held != rows:
            raise TeacherError(
                f"{folder} holds {held} of {rows} rows; complete the cache: "
                "launch/cache_teacher.py --config F"
            )
        mine = shards[ranks.rank :: ranks.world_size]
        together(lambda: _verify(folder, mine))
        self._device = ranks.device
        self._starts = [shard.start for shard in shards]
        self._shards: list[dict[str, Any]] = [
            {Path(file).stem: np.load(folder / s.name / file, mmap_mode="r") for file in s.files}
            for s in shards
        ]

    @override
    def __call__(self, batch: Batch) -> Knowledge:
        return self._stored(batch) if self.model is None else self.model(batch)

    @override
    def answers(self, batches: Sequence[Batch]) -> Iterator[Knowledge]:
        return map(self._stored, batches)

    def _stored(self, batch: Batch) -> Knowledge:
        # Dummy rows get zeros.
        if batch.rows is None:
            raise TypeError("a cache holds only training rows, and this batch has no row numbers")
        numbers = batch.rows.tolist()
        stored = {
            key: torch.from_numpy(np.stack([self._row(key, number) for number in numbers]))
            for key in self._shards[0]
        }
        moved = {key: tensor.to(self._device) for key, tensor in stored.items()}
        if "logits" in moved:
            return Knowledge(logits=moved["logits"])
        length = batch.valid.shape[1]
        ids, others = (tensor[:, :length] for tensor in (moved.pop("ids"), *moved.values()))
        if "counts" not in self._shards[0]:
            return Knowledge(kept=TopK(ids, others))
        shares = others.float() / others.sum(-1, keepdim=True).clamp(min=1)
        return Knowledge(kept=Draws(ids, shares.log()))

    @override
    def evict(self) -> None:
        if self.model is not None:
            self.model.evict()

    def _row(self, key: str, number: int) -> Any:
        if number < 0:
            return np.zeros_like(self._shards[0][key][0])
        index = bisect.bisect_right(self._starts, number) - 1
        return self._shards[index][key][number - self._starts[index]]

    def destroy(self) -> None:
        """Close the files, and free the memory of the model's engine."""
        self._shards.clear()
        if self.model is not None:
            self.model.destroy()


def _verify(folder: Path, shards: Sequence[AnswerShard]) -> None:
    for shard in shards:
        damage = damage_of(folder / shard.name, shard.files)
        if damage is not None:
            raise TeacherError(
                f"{folder / shard.name} is damaged: {damage}; launch/cache_teacher.py --config F "
                "computes its rows again"
            )
