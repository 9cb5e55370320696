"""Texts that a student learns from: which rows are continued, and how old texts may be."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from megakd.config.sections import GenerationConfig, RolloutConfig, RolloutServerConfig
from megakd.config.task import file_of_step
from megakd.data.loader import RowOrder, StepLayout, StepShape
from megakd.errors import ConfigError
from megakd.models.generation import Completion
from megakd.teachers import rollouts as rollout_source
from megakd.teachers.rollouts import (
    Rollout,
    RolloutSource,
    check_generated_texts,
    prompts_of,
    read_rollouts,
    write_rollouts,
)
from megakd.training.generated_texts import oldest

ROWS = 4
SERVER = RolloutServerConfig(url=("http://a:1",), push="none")


@pytest.fixture(autouse=True)
def _without_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_source, "collate_step", lambda *_, **__: ())


class Remote:
    """A generator whose texts name the version of the weights."""

    def __init__(self) -> None:
        self.version: int | None = None
        self.learned = 0  # updates of the student
        self.outstanding = 0
        self.seeds: list[int] = []

    def update(self, version: int) -> None:
        assert version == self.learned, "the weights are those of another update"
        assert not self.outstanding, "the weights change under a text"
        self.version = version

    def begin(self, prompts: Any, seeds: Any, sampling: Any) -> Any:
        assert self.version == self.learned
        assert len(prompts) == len(seeds) > 0
        assert sampling.max_new_tokens == 4
        self.seeds += seeds
        self.outstanding += 1
        first = 10 + (self.version or 0)
        made = [Completion((first, *prompt), finished=True) for prompt in prompts]

        def completions() -> list[Completion]:
            self.outstanding -= 1
            return made

        return completions


def step_rows() -> dict[str, Any]:
    def at(step: int) -> Any:
        return np.arange(ROWS) + ROWS * step

    prompts = SimpleNamespace(prompt=lambda number: (number,), routes=None)
    at.steps_per_epoch = 100  # type: ignore[attr-defined]
    data = SimpleNamespace(step=lambda _: (), step_rows=at)
    layout = SimpleNamespace(shape=SimpleNamespace(rank=0, world=1, rows_per_step=ROWS))
    return {"prompts": prompts, "continued": at, "data": data, "layout": layout}


def source(
    config: RolloutConfig, generator: Any, folder: Path, rows: dict[str, Any] | None = None
) -> RolloutSource:
    return RolloutSource(
        **(rows or step_rows()),
        config=config,
        collate=None,  # type: ignore[arg-type]
        generator=generator,
        folder=folder,
        seed=3,
        oldest=lambda: oldest(folder),
    )


class Local:
    """A generator whose texts name their prompt and seed."""

    def update(self, version: int) -> None: ...

    def begin(self, prompts: Any, seeds: Any, sampling: Any) -> Any:
        del sampling
        pairs = list(zip(prompts, seeds, strict=True))
        return lambda: [Completion((*prompt, seed % 97), finished=True) for prompt, seed in pairs]


def test_the_store_holds_what_a_resumed_run_reads_and_no_more(tmp_path, monkeypatch):
    """A checkpoint every 10 steps, of which two stay; the run is killed and resumed from the older.

    Files of other names stay.
    """
    learned: dict[int, Any] = {}
    collated: list[list[list[int]]] = []
    (tmp_path / "step-00000001 (copy).jsonl").touch()

    def collate(columns: Any, *_: Any, **__: Any) -> tuple[()]:
        collated.append([ids.tolist() for ids in columns["input_ids"]])
        return ()

    monkeypatch.setattr(rollout_source, "collate_step", collate)

    def run(start: int, stop: int) -> None:
        made = source(RolloutConfig(max_new_tokens=4), Local(), tmp_path)
        for step, _ in enumerate(made.iterate(start, stop), start):
            result = collated.pop()
            assert learned.setdefault(step, result) == result
            if (step + 1) % 10 == 0:
                (tmp_path / f"step-{step + 1}").mkdir(exist_ok=True)
                for old in range(step + 1 - 20, 0, -10):
                    shutil.rmtree(tmp_path / f"step-{old}", ignore_errors=True)

    run(0, 45)
    run(30, 70)

    names = ["step-00000001 (copy).jsonl", *(f"step-{step:08d}.jsonl" for step in range(50, 70))]
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == names


def learn(made: RolloutSource, generator: Remote, start: int, stop: int) -> None:
    generator.learned = start
    for _ in made.iterate(start, stop):
        generator.learned += 1


@settings(max_examples=20)
@given(staleness=st.integers(0, 3), from_step=st.integers(0, 4), killed=st.integers(1, 9))
def test_no_text_is_too_old_and_no_written_text_is_asked_for_again(staleness, from_step, killed):
    ages = {"max_staleness": staleness, "from_step": from_step, "mix": 0.6}
    config = RolloutConfig(max_new_tokens=4, server=SERVER, **ages)
    with TemporaryDirectory() as place:
        folder, first, second = Path(place), Remote(), Remote()
        learn(source(config, first, folder), first, 0, killed)
        written = {p: p.read_text() for p in folder.glob("*.jsonl")}

        learn(source(config, second, folder), second, killed, 12)

        assert all(path.read_text() == text for path, text in written.items())
        for path in folder.glob("*.jsonl"):
            step = int(path.stem.removeprefix("step-"))
            for text in read_rollouts(path):
                assert step >= from_step
                assert 0 <= step - text.version <= staleness
                assert text.completion == (10 + text.version, *text.prompt)
                assert ROWS * step <= text.row < ROWS * (step + 1)
        for generator in (first, second):
            assert len(set(generator.seeds)) == len(generator.seeds)
        before = {text.seed for path in written for text in read_rollouts(path)}
        assert before.isdisjoint(second.seeds)


def test_texts_are_asked_for_before_the_student_learns(tmp_path: Path) -> None:
    config = RolloutConfig(max_new_tokens=4, max_staleness=1, server=SERVER)
    generator = Remote()
    steps = source(config, generator, tmp_path).iterate(0, 3)

    asked = []
    for _ in steps:
        asked.append((generator.outstanding, len(generator.seeds)))
        generator.learned += 1

    # Two steps' texts at the first step, then one; none beyond the last step.
    assert asked == [(1, 2 * ROWS), (1, 3 * ROWS), (0, 3 * ROWS)]


def test_steps_of_the_data_have_rows_with_answers_and_texts_continue_prompts_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 0 to 5 are documents, rows 6 to 10 have both parts, and rows 11 to 20 are prompts."""
    continued, learned = set(range(6, 21)), set(range(11))
    shape = StepShape(ROWS, 1)
    texts, data = (RowOrder(np.array(sorted(r)), shape, seed=5) for r in (continued, learned))
    drawn: list[tuple[int, bool]] = []

    def collate(columns: Any, *_: Any, **__: Any) -> tuple[()]:
        drawn.extend((int(ids[0]), True) for ids in columns["input_ids"])
        return ()

    monkeypatch.setattr(rollout_source, "collate_step", collate)
    prompts: Any = SimpleNamespace(prompt=lambda number: (number,), routes=None)
    loader: Any = SimpleNamespace(
        step=lambda step: drawn.extend((int(row), False) for row in data(step)), step_rows=data
    )
    rows = {"prompts": prompts, "continued": texts, "data": loader, "layout": StepLayout(shape)}
    made = source(RolloutConfig(max_new_tokens=4, mix=0.6), Local(), tmp_path, rows)

    for _ in made.iterate(0, 40):
        pass

    assert {number for number, is_rollout in drawn if is_rollout} == continued
    assert {number for number, is_rollout in drawn if not is_rollout} == learned
    assert made.steps_per_epoch == 4


def test_the_log_has_means_over_the_texts_since_the_last_log(tmp_path: Path) -> None:
    finished = Rollout(0, (9,), (1, 2, 3), finished=True, version=4, seed=0)
    cut = finished._replace(completion=(1, 1, 1), finished=False, version=5)
    write_rollouts(file_of_step(tmp_path, 6), [finished, cut] * 2)
    made = source(RolloutConfig(max_new_tokens=4), Local(), tmp_path)
    assert made.scalars() == {}

    made.step(6)

    values = {"tokens_per_text": 3, "truncated": 0.5, "staleness": 1.5, "seconds": 0}
    assert made.scalars() == {f"rollout/{name}": value for name, value in values.items()}
    assert made.scalars() == {}


# Rows that fit are continued, and a run without any is refused early.

SECTIONS: dict[str, Any] = {
    "rollout": RolloutConfig(max_new_tokens=16),
    "eval.generation": GenerationConfig(max_new_tokens=16),
}

PROMPTED = Dataset.from_dict({"input_ids": [[1] * 6, [1] * 20], "prompt_length": [4, 20]})
"""A row with a prompt of 4 tokens and an answer, and a prompt of 20 tokens alone."""


def config_of(max_length: int = 64, **keys: Any) -> Any:
    method = SimpleNamespace(name="single", cuts_student=False)
    given = {"rollout": None, "eval": SimpleNamespace(generation=None)} | keys
    given |= {"trained_baselines": given.pop("baselines", ())}
    task = SimpleNamespace(row_length=max_length)
    return SimpleNamespace(task=task, method=method, teacher_specs={}, **given)


def student(context: int = 64) -> Any:
    config = LlamaConfig(max_position_embeddings=context)
    return SimpleNamespace(config=config, where="student.model")


def check(rows: Dataset, **keys: Any) -> None:
    encoded: Any = SimpleNamespace(train=rows, validation=rows, stream=None, chat=None)
    check_generated_texts(config_of(**keys), encoded, student())


@pytest.mark.parametrize("key", SECTIONS)
@pytest.mark.parametrize(("room", "continued"), [(36, [0, 1]), (35, [0]), (20, [0])])
def test_a_prompt_without_room_for_a_text_is_left_out(key, room, continued):
    for max_length, context in ((room, 64), (64, room)):
        config = config_of(max_length)
        prompts = prompts_of(PROMPTED, SECTIONS[key], config, student(context), key=key)

        assert prompts.continued.tolist() == continued


@pytest.mark.parametrize("key", SECTIONS)
def test_a_run_says_how_many_rows_are_left_out(key: str, caplog: pytest.LogCaptureFixture) -> None:
    given = SECTIONS[key]
    section = {"eval": SimpleNamespace(generation=given)} if "." in key else {"rollout": given}
    with caplog.at_level(logging.WARNING):
        check(PROMPTED, max_length=35, **section)

    (record,) = caplog.records
    assert record.getMessage() == (
        f"{key}: 1 of 2 rows have a prompt that is continued; 1 prompts leave no room for "
        "max_new_tokens, 0 rows have no prompt, 1 rows have no answer to learn from"
    )


@pytest.mark.parametrize("key", SECTIONS)
@pytest.mark.parametrize(
    ("room", "limit", "remedy"),
    [
        ((19, 64), "task.max_length", "raise task.max_length"),
        ((64, 19), "the context of student.model", "shorten the prompts"),
    ],
)
def test_a_run_in_which_no_prompt_fits_is_refused(key, room, limit, remedy):
    with pytest.raises(ConfigError) as caught:
        prompts_of(PROMPTED, SECTIONS[key], config_of(room[0]), student(room[1]), key=key)

    message = str(caught.value)
    assert message.startswith(f"{key}.max_new_tokens: 16 leaves 3 tokens of {limit} (19)")
    assert "none of the 2 prompts in 2 rows is that short (the shortest has 4)" in message
    assert message.endswith(f"set {key}.max_new_tokens to at most 15, or {remedy}")


def test_documents_alone_are_no_prompts() -> None:
    rows = Dataset.from_dict({"input_ids": [[1] * 6], "prompt_length": [0]})

    with pytest.raises(ConfigError, match="none of the 0 prompts in 1 rows"):
        prompts_of(rows, SECTIONS["rollout"], config_of(), student())


@pytest.mark.parametrize(("key", "value"), [("mix", 0.8), ("from_step", 10), ("", None)])
def test_steps_of_the_data_need_rows_with_an_answer(key, value):
    prompts, keys = PROMPTED.select([1]), {key: value} if key else {}
    rollout = RolloutConfig(max_new_tokens=16, **keys)

    check(PROMPTED, rollout=rollout)
    if not key:
        check(prompts, rollout=rollout)
        return
    message = rf"^rollout\.{key} \({value}\): .* all training rows are prompts without"
    with pytest.raises(ConfigError, match=message):
        check(prompts, rollout=rollout)
