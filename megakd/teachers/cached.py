"""A teacher's answers to every training row, computed once, kept on disk and read from there.

A cache is a folder: `cache.json` says what the answers depend on and lists the shards with their
checksums; a shard is a folder of numpy files, written whole or not at all. Classifiers and
regressors keep their logits in fp32, language models the k best ids of every position with their
log-probabilities, whose missing mass the loss knows.
"""

from __future__ import annotations

import bisect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from megakd import atomic
from megakd.engine.distributed import Ranks, on_main, together
from megakd.errors import TeacherError
from megakd.fingerprint import Fingerprint, differences
from megakd.stage import Batch, Knowledge, TopK

logger = logging.getLogger(__name__)
MANIFEST = "cache.json"
VERSION = 1
SHARD_ROWS = 4096
SHARD_BYTES = 256 << 20
Answers = Mapping[str, Tensor]
"""`logits` [B, C], or `ids` and `logprobs` [B, T, k], of some rows."""


class Shard(NamedTuple):
    """Some rows one after the other: where they begin, how many, and the checksum of each file."""

    name: str
    start: int
    rows: int
    checksums: Mapping[str, str]


class Layout(NamedTuple):
    """What one row's answer takes: bytes, and how many tokens it has on average."""

    row_bytes: int
    tokens_per_row: float

    def rows_per_shard(self) -> int:
        """So many that little is lost when a start is killed, and no file grows too large."""
        return max(1, min(SHARD_ROWS, SHARD_BYTES // self.row_bytes))


def build_cache(
    folder: Path,
    facts: Fingerprint,
    rows: Dataset,
    *,
    layout: Layout,
    asking: Callable[[], AbstractContextManager[Callable[[Dataset], Answers]]],
) -> None:
    """Writes the answers to all rows, or those that an earlier start has left out; a collective.

    Args:
        folder: of the cache.
        facts: what the answers depend on.
        rows: the training split.
        layout: of a row's answer.
        asking: loads the teacher, where anything is left to ask, and gives what asks it about
            some rows; the same on every rank.

    Raises:
        TeacherError: the folder holds the answers to something else.
        MegakdError: the disk is full, or the teacher cannot answer.
    """
    shards = on_main(lambda: _begun(folder, facts))
    step, done = layout.rows_per_shard(), sum(shard.rows for shard in shards)
    _announce(folder, layout, len(rows), done)
    if done == len(rows):
        return
    with asking() as answer:
        for start in range(done, len(rows), step):
            part = answer(rows.select(range(start, min(start + step, len(rows)))))

            def write(start: int = start, part: Answers = part) -> Shard:
                return _write(folder, start, part)

            shards.append(on_main(write))
            on_main(lambda: _record(folder, facts, shards, total=len(rows)))
            logger.info("%s: %d of %d rows", folder, start + shards[-1].rows, len(rows))


def _announce(folder: Path, layout: Layout, rows: int, done: int) -> None:
    size = rows * layout.row_bytes
    logger.info(
        "%s: %d rows of %d bytes (%.1f bytes a token), %.1f MB in %d shards; %d rows are there",
        *(folder, rows, layout.row_bytes, layout.row_bytes / max(layout.tokens_per_row, 1)),
        *(size / 1e6, -(-rows // layout.rows_per_shard()), done),
    )


def _begun(folder: Path, facts: Fingerprint) -> list[Shard]:
    """The shards that are there already."""
    if not (folder / MANIFEST).is_file():
        return []
    return _read_manifest(folder, facts)[0]


def _write(folder: Path, start: int, part: Answers) -> Shard:
    name = f"{start:010d}"
    with atomic.replaced_folder(folder / name) as made:
        for key, tensor in part.items():
            np.save(made / f"{key}.npy", tensor.numpy())
    files = sorted((folder / name).glob("*.npy"))
    count = len(next(iter(part.values())))
    return Shard(name, start, count, {file.name: atomic.sha256_of(file) for file in files})


def _record(folder: Path, facts: Fingerprint, shards: Sequence[Shard], *, total: int) -> None:
    listed = [shard._asdict() for shard in shards]
    tree = {"version": VERSION, "rows": total, "facts": facts, "shards": listed}
    atomic.write_json(folder / MANIFEST, tree)


def _read_manifest(folder: Path, facts: Fingerprint) -> tuple[list[Shard], int]:
    """The shards and how many rows there are to be.

    Raises:
        TeacherError: it is not there, cut off, or of other data or another teacher.
    """
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        shards = [Shard(**shard) for shard in tree["shards"]]
        there, rows, version = tree["facts"], int(tree["rows"]), tree["version"]
    except FileNotFoundError as error:
        raise TeacherError(
            f"{path} does not exist; make the cache first: launch/cache_teacher.py --config F"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TeacherError(f"{path} is no list of a cache's shards: {error}") from error
    here = json.loads(json.dumps(facts))
    differing = differences({"version": version, **there}, {"version": VERSION, **here})
    if differing:
        raise TeacherError(
            f"{folder} holds the answers to something else ({differing}); give another folder as "
            "the teacher's cache, or remove this one and make it anew"
        )
    return shards, rows


class CachedTeacher:
    """Answers micro-batches of training rows from a cache; nothing of the teacher is loaded."""

    def __init__(self, folder: Path, facts: Fingerprint, ranks: Ranks) -> None:
        shards, rows = on_main(lambda: _read_manifest(folder, facts))
        found = sum(shard.rows for shard in shards)
        if found != rows:
            raise TeacherError(
                f"{folder} holds {found} of {rows} rows; launch/cache_teacher.py goes on with it"
            )
        mine = shards[ranks.rank :: ranks.world_size]
        together(lambda: _verify(folder, mine))
        self._device = ranks.device
        self._starts = [shard.start for shard in shards]
        self._shards = [_opened(folder / shard.name, shard) for shard in shards]

    def __call__(self, batch: Batch) -> Knowledge:
        """What the teacher said of these rows; rows that only keep the ranks in step get zeros."""
        if batch.rows is None:
            raise TypeError("a cache answers training rows alone, and this batch has no numbers")
        numbers = batch.rows.tolist()
        said = {
            key: torch.from_numpy(np.stack([self._row(key, number) for number in numbers]))
            for key in self._shards[0]
        }
        moved = {key: tensor.to(self._device) for key, tensor in said.items()}
        if "logits" in moved:
            return Knowledge(logits=moved["logits"])
        length = batch.valid.shape[1]
        return Knowledge(top_k=TopK(moved["ids"][:, :length], moved["logprobs"][:, :length]))

    def expect(self, *, soon: bool) -> None:
        """Nothing to fetch: the system reads ahead in the files by itself."""

    def _row(self, key: str, number: int) -> Any:
        if number < 0:
            return np.zeros_like(self._shards[0][key][0])
        index = bisect.bisect_right(self._starts, number) - 1
        return self._shards[index][key][number - self._starts[index]]

    def destroy(self) -> None:
        """Lets go of the files."""
        self._shards.clear()


def _verify(folder: Path, shards: Sequence[Shard]) -> None:
    for shard in shards:
        for name, checksum in shard.checksums.items():
            path = folder / shard.name / name
            if not path.is_file() or atomic.sha256_of(path) != checksum:
                what = "its checksum differs" if path.is_file() else "it is not there"
                raise TeacherError(
                    f"{path} is damaged ({what}); remove {folder} and make the cache anew"
                )


def _opened(folder: Path, shard: Shard) -> dict[str, Any]:
    return {
        name.removesuffix(".npy"): np.load(folder / name, mmap_mode="r") for name in shard.checksums
    }
