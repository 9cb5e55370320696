"""Generated texts as training rows, and the prompts that texts are generated from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from megakd.contract.batch import IGNORE, ROUTE
from megakd.data.chat.tokens import PROMPT_LENGTH
from megakd.data.loader import lengths_of_rows, prompt_lengths, rows_with_targets
from megakd.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

    from megakd.contract.completions import Rollout


class TrainingRow(NamedTuple):
    """One row of a step: tokens, next tokens (-100: not counted), and positions, all [T].

    route: the number of the row's teacher; None if the rows name no teachers.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    is_rollout: bool
    route: int | None = None


def rollout_row(rollout: Rollout, route: int | None = None) -> TrainingRow:
    """Return a text as a row whose completion is the target; `route`: as in its prompt's row."""
    ids = np.array(rollout.prompt + rollout.completion.ids, dtype=np.int32)
    labels = np.full(len(ids), IGNORE, dtype=np.int32)
    first = len(rollout.prompt) - 1  # the position that predicts the first generated token
    labels[first:-1] = ids[first + 1 :]
    positions = np.arange(len(ids), dtype=np.int32)
    return TrainingRow(ids, labels, positions, is_rollout=True, route=route)


def columns_of_rows(rows: Sequence[TrainingRow]) -> dict[str, list[Any]]:
    """Return rows as a mapping of columns, as collators take them."""
    columns = {name: [getattr(row, name) for row in rows] for name in TrainingRow._fields}
    if None in columns[ROUTE]:
        del columns[ROUTE]
    return columns


class Prompts:
    """The rows of a split and the prompts in them.

    lengths: [N] tokens of every prompt; 0: the row has no prompt. Rows without a column
        `prompt_length` begin with `prompt_tokens` of prompt.
    continued: numbers of the rows whose prompt, of at most `most` tokens, a generator continues.
    learned: numbers of the rows that can be learned from as they are.
    """

    def __init__(
        self, rows: Dataset, *, prompt_tokens: int | None, most: int, key: str = "rollout"
    ) -> None:
        has_prompts = PROMPT_LENGTH in rows.column_names
        if has_prompts and prompt_tokens is not None:
            raise DataError(
                f"{key}.prompt_tokens: {prompt_tokens} applies to plain text, and the rows have "
                "prompts of their own; remove the key"
            )
        if not has_prompts and prompt_tokens is None:
            raise DataError(
                f"{key}: the rows have no prompts; use rows with messages, with prompt and "
                f"completion, or with prompt, or set {key}.prompt_tokens to the number of tokens "
                "at the beginning of each row that are continued"
            )
        self._rows = rows.with_format("numpy")
        self.lengths = (prompt_lengths if has_prompts else lengths_of_rows)(rows)
        if prompt_tokens is not None:
            self.lengths = self.lengths.clip(max=prompt_tokens)
        self.continued = np.flatnonzero((self.lengths > 0) & (self.lengths <= most))
        self.learned = rows_with_targets(rows)

    def prompt(self, row: int) -> tuple[int, ...]:
        """Return the tokens of a row that a generator continues; at least one token."""
        found = cast("dict[str, Any]", self._rows[int(row)])
        return tuple(np.asarray(found["input_ids"])[: self.lengths[row]].tolist())

    def row(self, row: int) -> TrainingRow:
        found = cast("dict[str, Any]", self._rows[int(row)])
        ids = np.asarray(found["input_ids"], dtype=np.int32)
        positions = found.get("position_ids")
        return TrainingRow(
            ids,
            np.asarray(found["labels"], dtype=np.int32),
            np.arange(len(ids), dtype=np.int32) if positions is None else np.asarray(positions),
            is_rollout=False,
            route=self.route(row),
        )

    def route(self, row: int) -> int | None:
        """Return the number of the teacher that a row names; None if the rows name no teachers."""
        if ROUTE not in self._rows.column_names:
            return None
        return int(cast("dict[str, Any]", self._rows[int(row)])[ROUTE])
