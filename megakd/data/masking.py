"""Dynamic masks of masked language modelling (Devlin et al. 2019, BERT, section 3.1).

A mask is a pure function of (seed, draw, row, position). It does not depend on the split of a step
into ranks and micro-batches, on the padding, or on where a run was resumed. With whole words, the
position of a word's first token decides for all tokens of the word whether they are chosen. Each
chosen token is then masked, replaced or kept for itself, as in BERT's `create_pretraining_data.py`.
Shapes: B rows of a micro-batch, T positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch

from megakd.contract.batch import IGNORE, Batch
from megakd.data.words import WORD_STARTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from megakd.config.run import TaskConfig

DEFAULT_PROBABILITY = 0.15
MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Fractions of the chosen tokens that become the mask token or a random token.

The other chosen tokens are not changed.
"""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class _Numbers(NamedTuple):
    """Three random numbers in [0, 1) for each position, [B, T] fp64."""

    choice: NDArray[np.float64]
    fate: NDArray[np.float64]
    token: NDArray[np.float64]


class Masking:
    """A function that masks tokens of a micro-batch and sets the original tokens as labels.

    Labels are not shifted.

    mask_id: the mask token.
    special_ids: tokens that are never masked.
    vocabulary: tokens that may replace a masked token at random.
    probability: probability of each token to be chosen; at least one token per row is chosen, or
        one word if the batch has `word_starts`.
    """

    def __init__(
        self,
        *,
        mask_id: int,
        special_ids: Sequence[int],
        vocabulary: Sequence[int],
        probability: float = DEFAULT_PROBABILITY,
    ) -> None:
        self._mask_id = mask_id
        self._special_ids = np.array(special_ids, dtype=np.int64)
        self._vocabulary = np.array(vocabulary, dtype=np.int64)
        self._probability = probability

    def __call__(
        self, batch: Batch, rows: NDArray[np.int64], *, seed: int, draw: int | NDArray[np.int64]
    ) -> Batch:
        """Return the batch with masked `input_ids`, and with `labels` [B, T] and `targets`.

        Args:
            batch: batch on the CPU, which is not changed. If its `inputs` have `word_starts`
                [B, T], all tokens of a word are chosen together; see `words`.
            rows: numbers of the batch's rows in the data set, at least 0; further rows are dummy
                rows.
            seed: seed of the run.
            draw: number of the mask to use for a row, such as the epoch, for all rows or by row.
        """
        ids = batch.inputs["input_ids"].numpy()  # [B, T]
        real = batch.valid.numpy()
        maskable = real & ~np.isin(ids, self._special_ids)
        numbers = _numbers(seed, draw, rows, ids.shape)
        starts, choice = batch.inputs.get(WORD_STARTS), numbers.choice
        if starts is not None:
            choice = np.take_along_axis(choice, starts.numpy(), axis=1)
        chosen = _chosen(choice, maskable, self._probability)
        shown = np.where(chosen, self._shown(ids, numbers), ids)
        labels = np.where(chosen, ids, IGNORE)
        inputs = {**batch.inputs, "input_ids": torch.from_numpy(shown)}
        inputs.pop(WORD_STARTS, None)
        targets = np.flatnonzero(chosen) if chosen.any() else np.zeros(1, dtype=np.int64)
        return Batch(inputs, torch.from_numpy(labels), batch.valid, torch.from_numpy(targets))

    def _shown(self, ids: NDArray[np.int64], numbers: _Numbers) -> NDArray[np.int64]:
        """Return the token that each position would show if the position were chosen."""
        place = (numbers.token * len(self._vocabulary)).astype(np.int64)
        is_masked = numbers.fate < MASKED_SHARE
        is_random = numbers.fate < MASKED_SHARE + RANDOM_SHARE
        shown = np.where(is_random, self._vocabulary[place], ids)
        return np.where(is_masked, self._mask_id, shown)


def task_masking(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> Masking | None:
    """Return the masking of an mlm task; None for other tasks."""
    if task.type != "mlm":
        return None
    special = {int(number) for number in tokenizer.all_special_ids}
    return Masking(
        mask_id=cast("int", tokenizer.mask_token_id),  # transformers' own type allows several
        special_ids=sorted(special),
        vocabulary=sorted(set(tokenizer.get_vocab().values()) - special),
        probability=task.mlm_probability or DEFAULT_PROBABILITY,
    )


def _chosen(
    choice: NDArray[np.float64], maskable: NDArray[np.bool_], probability: float
) -> NDArray[np.bool_]:
    """Return [B, T] bool: maskable positions below the probability, and the lowest of each row.

    The positions of a word have the same number, and the lowest are all positions of one word.
    """
    lowest = np.where(maskable, choice, np.inf).min(axis=1, keepdims=True)
    return maskable & ((choice < probability) | (choice == lowest))


def _numbers(
    seed: int,
    draw: int | NDArray[np.int64],
    rows: NDArray[np.int64],
    shape: tuple[int, ...],
) -> _Numbers:
    """Return random numbers of SplitMix64 (Steele, Lea and Flood 2014), one stream per row."""
    key = np.zeros((shape[0], 1), dtype=np.uint64)
    parts = np.zeros((3, shape[0], 1), dtype=np.uint64)
    parts[0] = seed
    parts[1, : len(rows), 0] = draw
    parts[2, : len(rows), 0] = rows
    for part in parts:
        key = _mixed(key + part + _GOLDEN)
    counter = np.arange(1, 3 * shape[1] + 1, dtype=np.uint64)
    values = _mixed(key + counter * _GOLDEN) >> np.uint64(11)  # [B, 3T]
    uniform = values.astype(np.float64) * 2.0**-53
    return _Numbers(uniform[:, 0::3], uniform[:, 1::3], uniform[:, 2::3])


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's output function, modulo 2^64."""
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))
