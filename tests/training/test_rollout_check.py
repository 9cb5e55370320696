"""Rows that are continued: rows that fit are used, and a run without any is refused early."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaConfig

from megakd.config.rollout import GenerationConfig, RolloutConfig
from megakd.errors import ConfigError
from megakd.rollouts.prompts import check_generated_texts, prompts_of

SECTIONS: dict[str, Any] = {
    "rollout": RolloutConfig(max_new_tokens=16),
    "eval.generation": GenerationConfig(max_new_tokens=16),
}

ROWS = Dataset.from_dict({"input_ids": [[1] * 6, [1] * 20], "prompt_length": [4, 20]})
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
        prompts = prompts_of(ROWS, SECTIONS[key], config, student(context), key=key)

        assert prompts.continued.tolist() == continued


@pytest.mark.parametrize("key", SECTIONS)
def test_a_run_says_how_many_rows_are_left_out(key: str, caplog: pytest.LogCaptureFixture) -> None:
    given = SECTIONS[key]
    section = {"eval": SimpleNamespace(generation=given)} if "." in key else {"rollout": given}
    with caplog.at_level(logging.WARNING):
        check(ROWS, max_length=35, **section)

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
        prompts_of(ROWS, SECTIONS[key], config_of(room[0]), student(room[1]), key=key)

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
    prompts, keys = ROWS.select([1]), {key: value} if key else {}
    rollout = RolloutConfig(max_new_tokens=16, **keys)

    check(ROWS, rollout=rollout)
    if not key:
        check(prompts, rollout=rollout)
        return
    message = rf"^rollout\.{key} \({value}\): .* all training rows are prompts without"
    with pytest.raises(ConfigError, match=message):
        check(prompts, rollout=rollout)
