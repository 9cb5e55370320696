"""Divergence and entropies of generated texts by position, summed over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from megakd.contract.batch import IGNORE
from megakd.contract.text_names import BY_POSITION
from megakd.engine.collectives import all_reduce_
from megakd.losses.text_statistics import ENTROPY, KL, TEACHER_ENTROPY, TOKENS, sums_by_group

if TYPE_CHECKING:
    from torch import Tensor

    from megakd.contract.batch import LossInputs
    from megakd.contract.stage import Pass

BUCKETS = 8
"""Most buckets of positions."""
NAMES = {"kl": KL, "entropy": ENTROPY, "teacher_entropy": TEACHER_ENTROPY}
"""Logged statistics, means in nats per token, and their columns in the sums."""


def bucket_ends(longest: int) -> tuple[int, ...]:
    """Return the end of every bucket of positions, not included.

    A bucket has twice as many positions as the bucket before it, up to rounding, because most
    changes are at the beginning of a text.

    Args:
        longest: number of positions of the longest text.
    """
    return tuple(sorted({-(-longest // 2**power) for power in range(BUCKETS)}))


def bucket_names(ends: Sequence[int]) -> list[str]:
    """Return `<first>-<last>` position of every bucket."""
    return [f"{first}-{end - 1}" for first, end in zip((0, *ends[:-1]), ends, strict=True)]


class TextCurves:
    """Sums over the positions of generated texts, collected while losses are measured.

    Args:
        longest: number of tokens of the longest completion.
    """

    def __init__(self, longest: int) -> None:
        self._ends = bucket_ends(longest)
        self._sums: Tensor | None = None

    def watching(self, plan: Sequence[Pass]) -> tuple[Pass, ...]:
        """Return the passes of a step such that the first pass adds to the sums.

        The first pass must use the whole first learner. Its losses do not change.
        """
        first, *others = plan

        def weigh(reading: LossInputs) -> Mapping[str, float]:
            self._add(reading)
            if first.weigh is not None:
                return first.weigh(reading)
            return dict.fromkeys(first.weights or {}, 1.0)

        return replace(first, weigh=weigh), *others

    def take(self) -> dict[str, dict[str, float]]:
        """Return the means by bucket and name since the last call, the same on every rank.

        The bucket "" has the means over all positions. Buckets without a token, and statistics of
        a teacher that gives no distribution over the whole vocabulary, are left out. A collective.
        """
        empty = torch.zeros(len(self._ends), 4, dtype=torch.float64)
        mine, self._sums = empty if self._sums is None else self._sums.cpu(), None
        sums = all_reduce_(mine)
        named = {"": sums.sum(0), **dict(zip(bucket_names(self._ends), sums, strict=True))}
        return {bucket: _means(found) for bucket, found in named.items() if found[TOKENS] > 0}

    def _add(self, reading: LossInputs) -> None:
        ends = torch.tensor(self._ends, device=reading.batch.labels.device)
        found = sums_by_group(reading, self._buckets(reading.batch.labels, ends), len(ends))
        self._sums = found if self._sums is None else self._sums + found

    @staticmethod
    def _buckets(labels: Tensor, ends: Tensor) -> Tensor:
        """Return [B, T] the bucket of every position; -1 without a label. A row is one text."""
        is_token = labels != IGNORE
        positions = is_token.long().cumsum(1) - 1  # of the generated token that is predicted
        buckets = torch.bucketize(positions, ends, right=True).clamp(max=len(ends) - 1)
        return torch.where(is_token, buckets, -1)


def by_position(curves: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the values by bucket as keys of the log."""
    return {
        f"{BY_POSITION}/{bucket}/{name}": value
        for bucket, values in curves.items()
        for name, value in values.items()
        if bucket
    }


def _means(sums: Tensor) -> dict[str, float]:
    means = {name: float(sums[place] / sums[TOKENS]) for name, place in NAMES.items()}
    return {name: value for name, value in means.items() if not math.isnan(value)}
