"""Dynamic masks of masked language modelling (Devlin et al. 2019, BERT, section 3.1).

A mask is a pure function of (seed, draw, row, position). It does not depend on the split of a step
into ranks and micro-batches, on the padding, or on where a run was resumed: the numbers are those
of SplitMix64 (Steele, Lea and Flood 2014), one stream per row and draw. Rows may mix the tokens of
two vocabularies, see `SecondTokens`. Shapes: B rows of a micro-batch, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE, Batch, Targets

DEFAULT_PROBABILITY = 0.15
MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Fractions of the chosen tokens that become the mask token or a random token.

The other chosen tokens are not changed.
"""


class SecondTokens(NamedTuple):
    """The tokens of a second vocabulary, between the tokens of the first in `input_ids`.

    offset: the number in `input_ids` of the second vocabulary's token 0. Smaller numbers are tokens
        of the first vocabulary.
    vocabulary: tokens that may replace a masked token of the second vocabulary at random, numbered
        as in `input_ids`.
    """

    offset: int
    vocabulary: NDArray[np.int64]

    def contains(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether each token is of the second vocabulary."""
        return ids >= self.offset

    def targets(self, ids: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Targets:
        """Return the chosen positions of the second vocabulary, at least one, with labels."""
        chosen = chosen & self.contains(ids)
        positions = _targets(chosen)
        labels = np.where(chosen, ids - self.offset, IGNORE).ravel()[positions]
        return Targets(torch.from_numpy(positions), torch.from_numpy(labels))


@dataclass(frozen=True, kw_only=True, eq=False)
class Masking:
    """A function that masks tokens of a micro-batch and sets the original tokens as labels.

    Labels are not shifted.

    mask_id: the mask token.
    special_ids: tokens that are never masked.
    vocabulary: tokens that may replace a masked token at random.
    probability: probability of each token to be chosen; at least one token per row is chosen.
    second: the second vocabulary, if the rows mix two. A random token is then of the same
        vocabulary as the token that it replaces. The labels of the second vocabulary are in
        `Extras.second`, in its own numbering, and `labels` and `targets` leave them out.
    """

    mask_id: int
    special_ids: Sequence[int]
    vocabulary: NDArray[np.int64]
    probability: float = DEFAULT_PROBABILITY
    second: SecondTokens | None = None

    def __call__(
        self, batch: Batch, rows: NDArray[np.int64], *, seed: int, draw: int | NDArray[np.int64]
    ) -> Batch:
        """Return the batch, on the CPU, with masked `input_ids`, `labels` [B, T] and `targets`.

        `rows` and `draw`: see `row_keys`.
        """
        ids = batch.inputs["input_ids"].numpy()  # [B, T]
        real = batch.valid.numpy()
        maskable = real & ~np.isin(ids, self.special_ids)
        keys = row_keys(seed, draw, rows, size=len(ids))[:, None]
        # Three numbers in [0, 1) for each position, [B, T]: whether, how, and by which token.
        numbers = uniform(keys, np.arange(1, 3 * ids.shape[1] + 1, dtype=np.uint64))
        choice, fate, token = (numbers[:, part::3] for part in range(3))
        lowest = np.where(maskable, choice, np.inf).min(axis=1, keepdims=True)
        chosen = maskable & ((choice < self.probability) | (choice == lowest))
        shown = np.where(chosen, self._shown(ids, fate, token), ids)
        inputs = {**batch.inputs, "input_ids": torch.from_numpy(shown)}
        second = None if self.second is None else self.second.targets(ids, chosen)
        if self.second is not None:
            chosen = chosen & ~self.second.contains(ids)
        return Batch(
            inputs,
            torch.from_numpy(np.where(chosen, ids, IGNORE)),
            batch.valid,
            torch.from_numpy(_targets(chosen)),
            extras=batch.extras._replace(second=second),
        )

    def _shown(
        self, ids: NDArray[np.int64], fate: NDArray[np.float64], token: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        random = _picked(self.vocabulary, token)
        if self.second is not None:
            others = _picked(self.second.vocabulary, token)
            random = np.where(self.second.contains(ids), others, random)
        is_masked, is_random = fate < MASKED_SHARE, fate < MASKED_SHARE + RANDOM_SHARE
        return np.where(is_masked, self.mask_id, np.where(is_random, random, ids))


def task_masking(
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    *,
    second: PreTrainedTokenizerBase | None = None,
) -> Masking | None:
    """Return the masking of an mlm task; None for other tasks.

    `second` is the tokenizer of a second vocabulary, whose token 0 has the number `len(tokenizer)`
    in the rows.
    """
    if task.type != "mlm":
        return None
    special, ordinary = _special_and_ordinary(tokenizer)
    others = None
    if second is not None:
        offset = len(tokenizer)
        more_special, more = _special_and_ordinary(second)
        special += [offset + number for number in more_special]
        others = SecondTokens(offset, offset + np.array(more, dtype=np.int64))
    return Masking(
        mask_id=cast("int", tokenizer.mask_token_id),  # transformers' own type allows several
        special_ids=special,
        vocabulary=np.array(ordinary),
        probability=task.mlm_probability or DEFAULT_PROBABILITY,
        second=others,
    )


def _special_and_ordinary(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    special = {int(number) for number in tokenizer.all_special_ids}
    return sorted(special), sorted(set(tokenizer.get_vocab().values()) - special)


def _picked(vocabulary: NDArray[np.int64], numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    return vocabulary[(numbers * len(vocabulary)).astype(np.int64)]


def _targets(chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.flatnonzero(chosen) if chosen.any() else np.zeros(1, dtype=np.int64)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def row_keys(
    seed: int, draw: int | NDArray[np.int64], rows: NDArray[np.int64], *, size: int, domain: int = 0
) -> NDArray[np.uint64]:
    """Return the keys [B] of the streams of a micro-batch's rows.

    `draw` is the number of the draw, such as the epoch, for all rows or by row. `rows` are numbers
    of at least 0; further rows, up to `size`, are dummy rows, on whose keys nothing may depend. The
    streams of two domains are independent.
    """
    parts = np.zeros((3, size), dtype=np.uint64)
    parts[0] = seed
    parts[1, : len(rows)] = draw
    parts[2, : len(rows)] = rows
    key = np.zeros(size, dtype=np.uint64)
    for part in parts:
        key = _mixed(key + part + _GOLDEN)
    return _mixed(key + np.uint64(domain) + _GOLDEN) if domain else key


def uniform(keys: NDArray[np.uint64], counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return the numbers in [0, 1) at places of streams."""
    values = _mixed(keys + counters * _GOLDEN) >> np.uint64(11)
    return values.astype(np.float64) * 2.0**-53


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))
