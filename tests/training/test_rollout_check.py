"""Prompts and texts that do not fit are refused before any weights are loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaConfig

from megakd.config.generation import GenerationConfig
from megakd.config.rollout import RolloutConfig
from megakd.errors import ConfigError
from megakd.training.rollout_check import check_generated_texts

SECTIONS = {"rollout": (16, None), "eval.generation": (None, 16)}


def check(key: str, *, max_length: int = 64, context: int = 64) -> None:
    """Checks 16 new tokens after prompts of 4 and 20 tokens; the second is in both splits."""
    rows = Dataset.from_dict({"input_ids": [[1] * 4, [1] * 20], "prompt_length": [4, 20]})
    rollout, generation = SECTIONS[key]
    config: Any = SimpleNamespace(
        rollout=rollout and RolloutConfig(max_new_tokens=rollout),
        eval=SimpleNamespace(generation=generation and GenerationConfig(max_new_tokens=generation)),
        task=SimpleNamespace(max_length=max_length),
    )
    encoded: Any = SimpleNamespace(train=rows, validation=rows, stream=None)
    model = LlamaConfig(max_position_embeddings=context)
    source: Any = SimpleNamespace(config=model, where="student.model")
    check_generated_texts(config, encoded, source)


@pytest.mark.parametrize("key", SECTIONS)
def test_a_prompt_and_text_that_just_fit_are_accepted(key: str) -> None:
    check(key, max_length=36, context=36)


@pytest.mark.parametrize("key", SECTIONS)
def test_a_prompt_and_text_beyond_the_length_of_a_row_are_refused(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(key, max_length=35)

    message = str(caught.value)
    assert message.startswith(
        f"{key}.max_new_tokens: 16 and the longest prompt of 20 tokens (row 2"
    )
    assert "set task.max_length to 36" in message
    assert f"lower {key}.max_new_tokens to 15" in message


@pytest.mark.parametrize("key", SECTIONS)
def test_a_prompt_and_text_beyond_the_context_of_the_student_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"student\.model has a context of 35"):
        check(key, context=35)
