"""Generated texts as training rows: the targets are the generated tokens, each once."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from megakd.contract.batch import IGNORE
from megakd.contract.completions import Completion, Rollout
from megakd.errors import DataError
from megakd.rollouts.prompts import Prompts, columns_of_rows, rollout_row

_tokens = st.lists(st.integers(0, 1000), min_size=1, max_size=6)


@given(prompt=_tokens, completion=_tokens)
def test_every_generated_token_is_a_target_exactly_once(
    prompt: list[int], completion: list[int]
) -> None:
    text = Rollout(0, tuple(prompt), Completion(tuple(completion), finished=True), 0, 0)

    row = rollout_row(text)

    assert row.input_ids.tolist() == prompt + completion
    assert row.labels[row.labels != IGNORE].tolist() == completion
    counted = np.flatnonzero(row.labels != IGNORE)
    assert counted.tolist() == list(range(len(prompt) - 1, len(row.input_ids) - 1))
    assert (row.input_ids[counted + 1] == row.labels[counted]).all()
    assert row.position_ids.tolist() == list(range(len(row.input_ids)))


def test_an_empty_completion_has_no_target() -> None:
    row = rollout_row(Rollout(0, (1, 2), Completion((), finished=False), 0, 0))

    assert row.labels.tolist() == [IGNORE, IGNORE]


def _rows(**columns: list) -> Dataset:
    return Dataset.from_dict(columns)


def test_the_prompt_of_a_row_has_the_length_that_the_row_states() -> None:
    rows = _rows(input_ids=[[1, 2, 3], [4, 5]], labels=[[2, 3, -100], [5, -100]],
                 prompt_length=[2, 1])  # fmt: skip

    prompts = Prompts(rows, prompt_tokens=None, most=9)

    assert [prompts.prompt(row) for row in range(2)] == [(1, 2), (4,)]
    assert prompts.lengths.tolist() == [2, 1]


def test_prompts_follow_a_selection_of_rows() -> None:
    rows = _rows(input_ids=[[1, 2, 3], [4, 5]], labels=[[2, 3, -100], [5, -100]],
                 prompt_length=[3, 1])  # fmt: skip

    prompts = Prompts(rows.select([1]), prompt_tokens=None, most=9)

    assert prompts.prompt(0) == (4,)


def test_a_row_is_continued_if_its_prompt_fits_and_learned_from_if_it_has_more_than_a_prompt() -> (
    None
):
    answered, prompt, document = [1, 2, 3], [4, 5], [6, 7, 8]
    long = [*range(9)]
    rows = _rows(input_ids=[answered, prompt, document, long],
                 prompt_length=[2, 2, 0, 5])  # fmt: skip

    prompts = Prompts(rows, prompt_tokens=None, most=4)

    assert prompts.continued.tolist() == [0, 1]
    assert prompts.learned.tolist() == [0, 2, 3]


def test_a_beginning_of_plain_text_is_no_longer_than_its_row() -> None:
    rows = _rows(input_ids=[[1, 2, 3], [4]], labels=[[2, 3, 4], [-100]])

    prompts = Prompts(rows, prompt_tokens=2, most=9)

    assert prompts.lengths.tolist() == [2, 1]
    assert prompts.learned.tolist() == [0, 1]


def test_a_row_of_the_data_keeps_its_labels_and_positions() -> None:
    rows = _rows(input_ids=[[1, 2, 3]], labels=[[2, -100, -100]], position_ids=[[0, 1, 0]])

    row = Prompts(rows, prompt_tokens=1, most=9).row(0)

    assert row.labels.tolist() == [2, -100, -100]
    assert row.position_ids.tolist() == [0, 1, 0]
    assert not row.is_rollout


def test_columns_hold_the_rows_in_their_order() -> None:
    rows = _rows(input_ids=[[1, 2], [3]], labels=[[2, -100], [-100]], prompt_length=[1, 1])
    prompts = Prompts(rows, prompt_tokens=None, most=9)
    text = rollout_row(Rollout(0, (7,), Completion((8,), finished=True), 0, 0))

    columns = columns_of_rows([prompts.row(1), text, prompts.row(0)])

    assert [ids.tolist() for ids in columns["input_ids"]] == [[3], [7, 8], [1, 2]]
    assert columns["is_rollout"] == [False, True, False]


def test_rows_without_prompts_need_a_length() -> None:
    rows = _rows(input_ids=[[1, 2]], labels=[[2, -100]])

    with pytest.raises(DataError, match=r"set rollout\.prompt_tokens"):
        Prompts(rows, prompt_tokens=None, most=9)


def test_a_length_for_rows_that_have_prompts_is_refused() -> None:
    rows = _rows(input_ids=[[1, 2]], labels=[[2, -100]], prompt_length=[1])

    with pytest.raises(DataError, match=r"rollout\.prompt_tokens: 1 applies to plain text"):
        Prompts(rows, prompt_tokens=1, most=9)
