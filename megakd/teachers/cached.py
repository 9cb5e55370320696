"""A teacher's answers on disk: a folder per range of rows, and a list of what they depend on.

`cache.json` holds the fingerprint of the answers. A shard is a finished folder of numpy files,
named by its first row, written whole or not at all. For classifiers and regressors a shard holds
logits in fp32. For language models a shard holds the k most likely ids of every position with their
log-probabilities; the loss derives the remaining probability. Or a shard holds the ids of random
draws with their counts.
"""

from __future__ import annotations

import bisect
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from megakd.data.batch import Batch, Draws, Outputs, Teacher, TopK
from megakd.engine.collectives import gather, on_main, raise_on_all
from megakd.engine.distributed import Ranks
from megakd.errors import TeacherError
from megakd.process.record import Fingerprint, differences
from megakd.process.seals import damage, entries, read_signed, sealed_folder, write_signed

if TYPE_CHECKING:
    from megakd.teachers.frozen import FrozenTeacher

logger = logging.getLogger(__name__)
MANIFEST = "cache.json"
VERSION = 3
SHARD_ROWS = 4096
SHARD_BYTES = 256 << 20
Answers = Mapping[str, Tensor]
"""Answers to some rows: `logits` [B, C]; `ids` and `logprobs` [B, T, k]; or `ids` and `counts`."""


def missing_rows(
    folder: Path, facts: Fingerprint, rows: int, *, ranks: Ranks, row_bytes: int
) -> list[range]:
    """Begin a cache, or go on with it; return the rows that it lacks by shard; a collective.

    `row_bytes`: size of the answer to one row.
    """

    def begin() -> None:
        if not (folder / MANIFEST).is_file():
            for shard in _shards_in(folder):  # nobody knows whose answers they hold
                shutil.rmtree(shard)
            record = {"version": VERSION, "rows": rows, "facts": facts}
            write_signed(folder / MANIFEST, record)
        _read_manifest(folder, facts)

    on_main(begin)
    for shard, reason in _damaged(folder, ranks).items():
        logger.warning("%s is damaged (%s): its rows are computed again", shard, reason)
        on_main(partial(shutil.rmtree, shard))
    sizes = on_main(
        lambda: {
            int(shard.name): len(np.load(next(shard.glob("*.npy")), mmap_mode="r"))
            for shard in _shards_in(folder)
        }
    )
    # Few rows, so that a killed process loses little work.
    step = max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))
    logger.info(
        "%s: %d rows of %d bytes, %.1f MB in %d shards; %d rows are already cached",
        *(folder, rows, row_bytes, rows * row_bytes / 1e6, -(-rows // step)),
        sum(sizes.values()),
    )
    first, missing = 0, []
    for start, size in [*sorted(sizes.items()), (rows, 0)]:
        missing += [range(n, min(n + step, start)) for n in range(first, start, step)]
        first = start + size
    return missing


def _shards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]" * 10))


def _damaged(folder: Path, ranks: Ranks) -> dict[Path, str]:
    """Return the shards that are not whole with the reason, of which each rank reads a part."""
    mine = on_main(lambda: _shards_in(folder))[ranks.rank :: ranks.world_size]
    reasons = gather(raise_on_all(lambda: [(shard, damage(shard)) for shard in mine]))
    return {shard: reason for part in reasons for shard, reason in part if reason is not None}


def write_shard(folder: Path, first: int, answers: Answers) -> None:
    """Write the answers to the rows from `first` on into a cache; call on rank 0."""
    with sealed_folder(folder / f"{first:010d}") as temporary:
        for key, tensor in answers.items():
            np.save(temporary / f"{key}.npy", tensor.numpy())


def _read_manifest(folder: Path, facts: Fingerprint) -> int:
    """Return the number of rows of a cache, after checking that it is for the same inputs."""
    path = folder / MANIFEST
    try:
        tree = read_signed(path)
        stored, rows, version = tree["facts"], int(tree["rows"]), tree["version"]
    except FileNotFoundError as error:
        raise TeacherError(
            f"{path} does not exist; create the cache first: megakd cache F"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TeacherError(
            f"{path} is damaged or of an earlier version ({error}); remove {folder} and create the "
            "cache again: megakd cache F"
        ) from error
    here = json.loads(json.dumps(facts))
    differing = differences({"version": version, **stored}, {"version": VERSION, **here})
    if differing:
        raise TeacherError(
            f"{folder} holds the cache of another teacher, other data or another setting "
            f"({differing}); set the teacher's cache to another folder, or remove this folder and "
            "create the cache again"
        )
    return rows


class CachedTeacher(Teacher):
    """A teacher that answers micro-batches of training rows from a cache.

    model: answers other rows than those of steps; None: all rows are rows of the cache.
    """

    model: FrozenTeacher | None = None

    def __init__(self, folder: Path, facts: Fingerprint, ranks: Ranks) -> None:
        rows = on_main(lambda: _read_manifest(folder, facts))
        for shard, reason in _damaged(folder, ranks).items():
            raise TeacherError(
                f"{shard} is damaged: {reason}; megakd cache F computes its rows again"
            )
        shards = on_main(lambda: _shards_in(folder))
        self._device = ranks.device
        self._starts = [int(shard.name) for shard in shards]
        self._shards: list[dict[str, Any]] = [
            {
                Path(file).stem: np.load(shard / file, mmap_mode="r")
                for file in sorted(entries(shard))
            }
            for shard in shards
        ]
        cached = sum(len(next(iter(shard.values()))) for shard in self._shards)
        if cached != rows:
            raise TeacherError(
                f"{folder} holds {cached} of {rows} rows; complete the cache: megakd cache F"
            )

    @override
    def __call__(self, batch: Batch) -> Outputs:
        return self._stored(batch) if self.model is None else self.model(batch)

    @override
    def answers(self, batches: Sequence[Batch]) -> Iterator[Outputs]:
        return map(self._stored, batches)

    def _stored(self, batch: Batch) -> Outputs:
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
            return Outputs(logits=moved["logits"])
        length = batch.valid.shape[1]
        ids, others = (tensor[:, :length] for tensor in (moved.pop("ids"), *moved.values()))
        if "counts" not in self._shards[0]:
            return Outputs(kept=TopK(ids, others))
        shares = others.float() / others.sum(-1, keepdim=True).clamp(min=1)
        return Outputs(kept=Draws(ids, shares.log()))

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
