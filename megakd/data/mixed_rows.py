"""Mixtures: how many encoded rows of each source an epoch has.

Every source is encoded once. The rows of an epoch are chosen from the encoded rows, once, as a
function of (weights, seed): the shares are exact in every epoch, and every row of every source is
read at least once. The loader then orders the rows of each epoch anew.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from megakd.config.task import MixtureSource
from megakd.data.arrow import key_of
from megakd.data.chat.counts import ChatCounts
from megakd.data.encoding import Encoded
from megakd.errors import DataError

logger = logging.getLogger(__name__)
MANY_TIMES = 10
"""A source that an epoch reads more often than this is worth a warning."""


def mixed(encoded: Encoded, sources: Mapping[str, MixtureSource], *, seed: int) -> Encoded:
    """Return the data with the rows of an epoch: rows of every source in proportion to its weight.

    Rows are counted as they are encoded: a long document has many. The source with the most rows in
    relation to its weight is read once. The others are read as often as their weight asks: whole,
    and then a share that the seed chooses.
    """
    parts = {name: (encoded.chat or {}).get(f"train/{name}", ChatCounts()) for name in sources}
    for name, part in parts.items():
        if not part.kept:
            raise DataError(
                f"task.mixture.{name}: no row is left for training: {part.rows} of its rows are "
                "not held out for validation, and none of them can be encoded; set "
                "task.validation_files, or give the source more rows"
            )
    sizes = np.array([part.kept for part in parts.values()])
    weights = [source.weight for source in sources.values()]
    counts = rows_of_sources(sizes, np.array(weights))
    starts = np.cumsum(sizes) - sizes  # the rows of a source follow each other
    chosen = [
        start + _drawn(np.arange(size), int(count), np.random.default_rng([seed, number]))
        for number, (start, size, count) in enumerate(zip(starts, sizes, counts, strict=True))
    ]
    for name, size, count in zip(sources, sizes, counts, strict=True):
        _tell(name, int(size), int(count), share=count / counts.sum())
    tokens = np.array([part.tokens for part in parts.values()])
    return encoded._replace(
        train=encoded.train.select(np.sort(np.concatenate(chosen))),
        tokens_per_row=float((tokens / sizes * counts).sum() / counts.sum()),
        content_hash=key_of(encoded.content_hash, "mixed", weights, seed),
    )


def rows_of_sources(sizes: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return [S] the rows that an epoch reads of each source, at least all of its rows.

    The shares differ from the weights by less than a row.
    """
    total = (sizes / weights).max()
    return np.maximum(sizes, np.rint(total * weights).astype(np.int64))


def _drawn(places: NDArray[np.int64], count: int, random: np.random.Generator) -> NDArray[np.int64]:
    times, rest = divmod(count, len(places))
    return np.concatenate([np.tile(places, times), random.permutation(places)[:rest]])


def _tell(name: str, size: int, count: int, *, share: float) -> None:
    times = count / size
    logger.log(
        logging.WARNING if times > MANY_TIMES else logging.INFO,
        "mixture: %s has %d training rows; an epoch reads %d rows of it (%.1f %% of all rows, each "
        "row %.2f times)",
        *(name, size, count, 100 * share, times),
    )
