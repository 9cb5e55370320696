"""Rows in as few micro-batches as a token budget allows, spread evenly over the ranks."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

from megakd.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def budgeted(lengths: NDArray[np.int64], budget: int, *, ranks: int) -> list[NDArray[np.int64]]:
    """Return the row numbers of every micro-batch, a function of the arguments alone.

    First fit by decreasing length finds the number of micro-batches, which is rounded up to a
    multiple of the ranks. The rows are then spread evenly over all micro-batches if no micro-batch
    exceeds the budget that way. Micro-batch k belongs to rank k modulo `ranks`.

    Args:
        lengths: [N] tokens of each row.
        budget: the most tokens of a micro-batch.
        ranks: number of ranks.

    Returns:
        At least one micro-batch per rank, and equally many per rank; some may have no row.

    Raises:
        DataError: a row has more tokens than the budget.
    """
    if len(lengths) and lengths.max() > budget:
        raise DataError(
            f"train.tokens_per_rank is {budget}, and a training row has {lengths.max()} tokens; "
            "raise train.tokens_per_rank, or shorten the rows (task.max_length, or the rollouts)"
        )
    order = np.argsort(-lengths, kind="stable")
    tightest = _first_fit(lengths[order], budget)
    count = -(-(int(tightest.max(initial=0)) + 1) // ranks) * ranks
    even = _spread(lengths[order], count)
    chosen = tightest if _loads(even, lengths[order], count).max() > budget else even
    micro_batch_of = np.empty_like(chosen)
    micro_batch_of[order] = chosen
    dealt = _dealt(_loads(chosen, lengths[order], count), ranks)
    return [np.flatnonzero(micro_batch_of == number) for number in dealt]


def _first_fit(lengths: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    loads = np.zeros(max(1, len(lengths)), dtype=np.int64)
    chosen = np.zeros(len(lengths), dtype=np.int64)
    for index, length in enumerate(lengths):
        chosen[index] = np.argmax(loads[: index + 1] + length <= budget)
        loads[chosen[index]] += length
    return chosen


def _spread(lengths: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    loads = [(0, number) for number in range(count)]
    chosen = np.zeros(len(lengths), dtype=np.int64)
    for index, length in enumerate(lengths.tolist()):
        load, chosen[index] = loads[0]
        heapq.heapreplace(loads, (load + length, int(chosen[index])))
    return chosen


def _loads(chosen: NDArray[np.int64], lengths: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return [count] tokens of every micro-batch."""
    loads = np.zeros(count, dtype=np.int64)
    np.add.at(loads, chosen, lengths)
    return loads


def _dealt(loads: NDArray[np.int64], ranks: int) -> list[int]:
    """Return the numbers of the micro-batches in the order in which the ranks take turns.

    Micro-batches that run at the same time are about equally long, and the longest of them goes to
    the rank with the fewest tokens so far.
    """
    totals = np.zeros(ranks, dtype=np.int64)
    dealt: list[int] = []
    for turn in np.argsort(-loads, kind="stable").reshape(-1, ranks):
        of_rank = np.empty_like(turn)
        of_rank[np.argsort(totals, kind="stable")] = turn
        totals += loads[of_rank]
        dealt += of_rank.tolist()
    return dealt
