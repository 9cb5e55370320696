"""Rollouts: where rows come from, generated texts as rows, and their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.config.sections import RolloutConfig
from megakd.data.batch import IGNORE
from megakd.errors import DataError
from megakd.teachers.rollouts import (
    Prompts,
    Rollout,
    columns_of,
    learns_from_texts,
    read_rollouts,
    text_seed,
    write_rollouts,
)

_tokens = st.lists(st.integers(0, 1000), min_size=1, max_size=6)


@given(prompt=_tokens, completion=_tokens)
def test_every_generated_token_is_a_target_exactly_once(
    prompt: list[int], completion: list[int]
) -> None:
    text = Rollout(0, tuple(prompt), tuple(completion), finished=True, version=0, seed=0)
    empty = text._replace(completion=(), finished=False)

    columns = columns_of([text, empty])

    (ids, _), (labels, unlearned) = columns["input_ids"], columns["labels"]
    assert ids.tolist() == prompt + completion
    counted = np.flatnonzero(labels != IGNORE)
    assert labels[counted].tolist() == completion
    assert counted.tolist() == list(range(len(prompt) - 1, len(ids) - 1))
    assert unlearned.tolist() == [IGNORE] * len(prompt)


def prompts_of(
    *ids: list[int], lengths: list[int] | None = None, tokens: int | None = None, most: int = 9
) -> Prompts:
    """Prompts of rows that state their lengths, or of plain text, of which `tokens` are prompts."""
    columns = {} if lengths is None else {"prompt_length": lengths}
    rows = Dataset.from_dict({"input_ids": list(ids), **columns})
    return Prompts(rows, prompt_tokens=tokens, most=most)


def test_a_row_is_continued_if_its_prompt_fits_and_learned_from_if_more_follows() -> None:
    answered, prompt, document, long = [1, 2, 3], [4, 5], [6, 7, 8], [*range(9)]

    prompts = prompts_of(answered, prompt, document, long, lengths=[2, 2, 0, 5], most=4)

    assert prompts.continued.tolist() == [0, 1]
    assert prompts.answers == 3
    assert [prompts.prompt(row) for row in range(2)] == [(1, 2), (4, 5)]


def test_a_beginning_of_plain_text_is_no_longer_than_its_row() -> None:
    prompts = prompts_of([1, 2, 3], [4], tokens=2)

    assert prompts.lengths.tolist() == [2, 1]
    assert prompts.answers == 2


def test_a_prompt_has_the_length_that_its_row_states_also_in_a_selection() -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "prompt_length": [2, 1]})

    assert Prompts(rows.select([1]), prompt_tokens=None, most=9).prompt(0) == (3,)


@pytest.mark.parametrize(
    ("lengths", "tokens", "message"),
    [
        (None, None, r"set rollout\.prompt_tokens"),
        ([1], 1, r"rollout\.prompt_tokens: 1 applies to plain text"),
    ],
)
def test_a_length_is_given_for_rows_without_prompts_alone(lengths, tokens, message) -> None:
    with pytest.raises(DataError, match=message):
        prompts_of([1, 2], lengths=lengths, tokens=tokens)


def _drawn(steps: int, seed: int = 0, **given: object) -> list[bool]:
    config = RolloutConfig(max_new_tokens=4, **given)  # type: ignore[arg-type]
    return [learns_from_texts(config, step, seed=seed) for step in range(steps)]


@pytest.mark.parametrize("mix", [0.0, 0.7, 1.0])
def test_the_share_of_texts_in_many_steps_is_that_of_the_config(mix: float) -> None:
    assert np.mean(_drawn(3000, mix=mix)) == pytest.approx(mix, abs=0.03 * (0 < mix < 1))


def test_a_step_is_drawn_by_its_number_and_the_seed_and_uses_the_data_before_the_section() -> None:
    first, again, other = (_drawn(64, seed, mix=0.5) for seed in (3, 3, 4))

    assert first == again != other
    assert _drawn(5, from_step=3) == [False] * 3 + [True] * 2


def test_the_seed_of_a_text_differs_by_run_step_and_row() -> None:
    seeds = {text_seed(n, step, row) for n in range(3) for step in range(10) for row in range(10)}

    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


_ids = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
_rollouts = st.builds(
    Rollout,
    row=st.integers(0, 2**40),
    prompt=_ids,
    completion=_ids,
    finished=st.booleans(),
    version=st.integers(0, 10**6),
    seed=st.integers(0, 2**63 - 1),
)
_TEXT = Rollout(3, (1, 2), (5, 6), finished=True, version=7, seed=9)


@settings(max_examples=20)
@given(texts=st.lists(_rollouts, max_size=4))
def test_texts_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[Rollout]
) -> None:
    path = tmp_path_factory.mktemp("store") / "student" / "step-00000012.jsonl"

    write_rollouts(path, texts)

    assert read_rollouts(path) == texts


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((lambda text, n=n: text[:n], "") for n in (0, 60)),
        (lambda text: text[: text.rindex("\n", 0, -1) + 1], "is not a complete file"),
    ],
    ids=["empty", "60 bytes", "a line less"],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage, message) -> None:
    path = tmp_path / "step-00000004.jsonl"
    write_rollouts(path, [_TEXT, _TEXT])
    path.write_text(damage(path.read_text()))

    with pytest.raises(DataError, match=rf"step-00000004\.jsonl.*{message}"):
        read_rollouts(path)
