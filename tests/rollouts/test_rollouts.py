"""Rollouts: where rows come from, generated texts as rows, and their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from megakd.config.rollout import RolloutConfig
from megakd.contract.batch import IGNORE
from megakd.contract.completions import Completion, Rollout
from megakd.errors import DataError
from megakd.rollouts.batches import REPLAYED_STEPS, RolloutDraws
from megakd.rollouts.prompts import Prompts, columns_of_rows, rollout_row
from megakd.rollouts.store import RolloutStore, rollout_files
from megakd.training.stage_folder import LENGTHS

_tokens = st.lists(st.integers(0, 1000), min_size=1, max_size=6)


@given(prompt=_tokens, completion=_tokens)
def test_every_generated_token_is_a_target_exactly_once(
    prompt: list[int], completion: list[int]
) -> None:
    text = Rollout(0, tuple(prompt), Completion(tuple(completion), finished=True), 0, 0)
    empty = text._replace(completion=Completion((), finished=False))

    row = rollout_row(text)

    assert row.input_ids.tolist() == prompt + completion
    counted = np.flatnonzero(row.labels != IGNORE)
    assert row.labels[counted].tolist() == completion
    assert counted.tolist() == list(range(len(prompt) - 1, len(row.input_ids) - 1))
    assert row.position_ids.tolist() == list(range(len(row.input_ids)))
    assert rollout_row(empty).labels.tolist() == [IGNORE] * len(prompt)


def test_a_row_is_continued_if_its_prompt_fits_and_learned_from_if_more_follows() -> None:
    answered, prompt, document, long = [1, 2, 3], [4, 5], [6, 7, 8], [*range(9)]
    ids = [answered, prompt, document, long]
    rows = Dataset.from_dict({"input_ids": ids, "prompt_length": [2, 2, 0, 5]})

    prompts = Prompts(rows, prompt_tokens=None, most=4)

    assert prompts.continued.tolist() == [0, 1]
    assert prompts.learned.tolist() == [0, 2, 3]


def test_a_beginning_of_plain_text_is_no_longer_than_its_row() -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "labels": [[2, 3, 4], [-100]]})

    prompts = Prompts(rows, prompt_tokens=2, most=9)

    assert prompts.lengths.tolist() == [2, 1]
    assert prompts.learned.tolist() == [0, 1]


def test_columns_hold_the_rows_in_their_order_with_labels_and_positions() -> None:
    columns = {"labels": [[2, -100], [-100]], "position_ids": [[0, 0], [0]]}
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "prompt_length": [2, 1], **columns})
    prompts, selected = (
        Prompts(one, prompt_tokens=None, most=9) for one in (rows, rows.select([1]))
    )
    text = rollout_row(Rollout(0, (7,), Completion((8,), finished=True), 0, 0))

    columns = columns_of_rows([prompts.row(1), text, prompts.row(0)])

    assert [ids.tolist() for ids in columns["input_ids"]] == [[3], [7, 8], [1, 2]]
    assert [ids.tolist() for ids in columns["labels"]] == [[-100], [8, -100], [2, -100]]
    assert [ids.tolist() for ids in columns["position_ids"]] == [[0], [0, 1], [0, 0]]
    assert columns["is_rollout"] == [False, True, False]
    # The prompt has the length that its row states, also in a selection.
    assert [prompts.prompt(row) for row in range(2)] == [(1, 2), (3,)]
    assert selected.prompt(0) == (3,)


@pytest.mark.parametrize(
    ("columns", "prompt_tokens", "message"),
    [
        ({}, None, r"set rollout\.prompt_tokens"),
        ({"prompt_length": [1]}, 1, r"rollout\.prompt_tokens: 1 applies to plain text"),
    ],
)
def test_a_length_is_given_for_rows_without_prompts_alone(columns, prompt_tokens, message) -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[2, -100]], **columns})

    with pytest.raises(DataError, match=message):
        Prompts(rows, prompt_tokens=prompt_tokens, most=9)


def _draws(seed: int = 0, **given: object) -> RolloutDraws:
    return RolloutDraws(RolloutConfig(max_new_tokens=4, **given), seed=seed)  # type: ignore[arg-type]


def test_rows_have_one_source_per_step_or_one_each() -> None:
    mix = {"rollout": 0.5, "data": 0.5}
    by_step, by_row = _draws(mix=mix), _draws(mix=mix, mix_per="row")

    assert all(len(set(by_step.sources(step, 64))) == 1 for step in range(20))
    assert all(set(by_row.sources(step, 64)) == {"rollout", "data"} for step in range(20))


@pytest.mark.parametrize("mix_per", ["step", "row"])
def test_the_shares_of_many_steps_are_those_of_the_config(mix_per: str) -> None:
    draws = _draws(mix={"rollout": 0.5, "replay": 0.3, "data": 0.2}, mix_per=mix_per)

    drawn = np.concatenate([draws.sources(step, 4) for step in range(3000)])

    shares = {source: (drawn == source).mean() for source in ("rollout", "replay", "data")}
    assert shares == pytest.approx({"rollout": 0.5, "replay": 0.3, "data": 0.2}, abs=0.03)


@given(step=st.integers(0, 200), seed=st.integers(0, 2**32 - 1))
def test_a_step_does_not_depend_on_what_was_asked_before(step: int, seed: int) -> None:
    mix = {"rollout": 0.4, "replay": 0.4, "data": 0.2}
    used, fresh = _draws(seed, mix=mix), _draws(seed, mix=mix)
    for earlier in range(0, step, 7):
        used.sources(earlier, 3)
        used.replayable(earlier)

    assert used.sources(step, 5).tolist() == fresh.sources(step, 5).tolist()
    assert used.replayable(step) == fresh.replayable(step)


@given(seed=st.integers(0, 2**32 - 1), mix_per=st.sampled_from(["step", "row"]))
def test_every_replayed_step_has_generated_texts(seed: int, mix_per: str) -> None:
    draws = _draws(seed, mix={"rollout": 0.3, "replay": 0.7}, mix_per=mix_per)

    for step in range(30):
        for earlier in draws.replayable(step):
            assert earlier < step
            assert "rollout" in draws.sources(earlier, 3)
        if "replay" in draws.sources(step, 3):
            assert draws.replayable(step)


def test_what_later_steps_replay_is_new_or_was_already_replayable() -> None:
    """A resumed run may therefore read the texts before the step that it replays."""
    draws = _draws(mix={"rollout": 0.7, "replay": 0.3})

    for step in range(0, 400, 50):
        kept = draws.replayable(step)
        assert len(kept) <= REPLAYED_STEPS
        for later in range(step, 400):
            assert set(draws.replayable(later)) <= {*kept, *range(step, later)}
    assert len(draws.replayable(400)) == REPLAYED_STEPS


def test_the_first_text_is_new_and_steps_before_the_section_use_the_data() -> None:
    replayed, later = _draws(mix={"replay": 1.0}), _draws(from_step=3)

    assert [set(replayed.sources(step, 3)) for step in (0, 1)] == [{"rollout"}, {"replay"}]
    assert [later.sources(step, 1)[0] for step in range(5)] == ["data"] * 3 + ["rollout"] * 2


def test_the_seed_of_a_text_differs_by_run_step_and_row() -> None:
    draws = [_draws(seed) for seed in range(3)]
    seeds = {d.seed_of(step, row) for d in draws for step in range(10) for row in range(10)}

    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


_ids = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
_rollouts = st.builds(
    Rollout,
    row=st.integers(0, 2**40),
    prompt=_ids,
    completion=st.builds(Completion, ids=_ids, finished=st.booleans()),
    version=st.integers(0, 10**6),
    seed=st.integers(0, 2**63 - 1),
)
_TEXT = Rollout(3, (1, 2), Completion((5, 6), finished=True), version=7, seed=9)


@given(texts=st.lists(_rollouts, max_size=4), part=st.floats(0, 1, exclude_max=True))
def test_texts_are_read_as_they_were_written_together_or_one_of_them(
    tmp_path_factory: pytest.TempPathFactory, texts: list[Rollout], part: float
) -> None:
    store = RolloutStore(tmp_path_factory.mktemp("store"))

    store.write(12, texts)

    assert store.has(12)
    assert not store.has(11)
    assert store.read(12) == texts
    if texts:
        assert store.read_one(12, part) == texts[int(part * len(texts))]


@pytest.fixture
def written(tmp_path: Path) -> tuple[RolloutStore, Path]:
    store = RolloutStore(tmp_path)
    store.write(4, [_TEXT, _TEXT])
    (path,) = rollout_files(tmp_path)
    return store, path


def test_one_text_is_read_from_a_damaged_file_or_the_file_is_named(written) -> None:
    store, path = written
    path.write_text(path.read_text()[:-9] + "\n")

    assert store.read_one(4, 0.0) == _TEXT
    with pytest.raises(DataError, match=r"step-00000004\.jsonl"):
        store.read_one(4, 0.9)
    with pytest.raises(DataError, match=r"00000005\.jsonl does not exist, and rollout\.mix repl"):
        store.read_one(5, 0.0)
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(DataError, match=r"step-00000004\.jsonl is not a complete file"):
        store.read_one(4, 0.5)


def test_texts_of_an_equal_run_are_kept_and_those_of_another_set_aside(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        store = RolloutStore(tmp_path / "student")
        store.begin({"seed": seed})
        assert not store.has(0)
        store.write(0, [_TEXT._replace(seed=seed)])
        RolloutStore(tmp_path / "student").begin({"seed": seed})

    names = ("student.before-1", "student.before-2", "student")
    assert [RolloutStore(tmp_path / name).read(0)[0].seed for name in names] == [1, 2, 3]


@pytest.mark.parametrize("key", ["train.max_steps", "train.num_train_epochs"])
def test_texts_of_a_run_of_another_length_are_kept_only_beside_a_checkpoint(tmp_path, key):
    """Every rate of a schedule depends on the length."""
    facts = {"seed": 1, key: 8}
    RolloutStore(tmp_path / "student").begin({**facts, key: 4})
    store = RolloutStore(tmp_path / "student")
    store.write(0, [_TEXT])

    store.begin(facts, may_differ=LENGTHS)
    assert store.has(0)
    store.begin({**facts, key: 16})
    assert not store.has(0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((lambda text, n=n: text[:n], "") for n in (0, 60)),
        (lambda text: text[: text.rindex("\n", 0, -1) + 1], "holds 1 rollouts instead of 2"),
        (
            lambda text: text.replace('"format":1', '"format":2'),
            "format 2, and this version reads format 1",
        ),
    ],
    ids=["empty", "60 bytes", "a line less", "version"],
)
def test_a_damaged_file_is_named(written, damage, message) -> None:
    store, path = written
    path.write_text(damage(path.read_text()))

    with pytest.raises(DataError, match=rf"step-00000004\.jsonl.*{message}"):
        store.read(4)
