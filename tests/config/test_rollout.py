"""The section `rollout`: what it accepts, and the messages for what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_files import message_of

from megakd.config.file import load_config
from megakd.config.rollout import LengthStep, RolloutConfig, rollout_block
from megakd.contract.rollouts import Sampling

_TEXT = ("task={type: causal_lm, dataset: rows.jsonl}",)


def _rollout(text: str) -> str:
    return f"rollout={{{text}}}"


def test_the_shortest_section_generates_all_rows_from_the_student_as_it_is(run_file: Path) -> None:
    rollout = load_config(run_file, (*_TEXT, _rollout("max_new_tokens: 8"))).rollout

    assert rollout is not None
    assert dict(rollout.mix) == {"rollout": 1.0}
    assert rollout.sampling_at(0) == Sampling(8, temperature=1.0, top_p=1.0, top_k=None)
    assert rollout.max_staleness == 0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("mix: {rollout: 0.5}", "rollout.max_new_tokens: missing"),
        ("max_new_tokens: 0", "rollout.max_new_tokens"),
        ("max_new_tokens: 4, mix: {rollout: 0.5, data: 0.4}", "must add up to 1 (got 0.9"),
        ("max_new_tokens: 4, mix: {rollouts: 1.0}", "rollout.mix"),
        ("max_new_tokens: 4, sampling: {top_p: 0}", "rollout.sampling.top_p"),
        ("max_new_tokens: 4, sampling: {temperature: -1}", "rollout.sampling.temperature"),
        (
            "max_new_tokens: [{from_step: 5, max_new_tokens: 4}]",
            "from_step must begin with 0 and increase (got [5])",
        ),
        ("max_new_tokens: 4, by: mentor", 'rollout.by: there is no teacher "mentor"'),
        (
            "max_new_tokens: 4, files: a.jsonl, max_staleness: 1",
            "rollout.max_staleness: 1 applies to texts that are generated during the run",
        ),
    ],
)
def test_a_wrong_section_is_refused(run_file: Path, section: str, message: str) -> None:
    assert message in message_of(run_file, *_TEXT, _rollout(section))


def test_a_task_without_text_generation_is_refused(run_file: Path) -> None:
    message = message_of(run_file, _rollout("max_new_tokens: 4"))
    evaluated = message_of(run_file, "eval.generation={max_new_tokens: 4}")

    assert (
        "rollout: supported only for causal_lm, whose models generate text, and task.type"
        in message
    )
    assert "eval.generation: supported only for causal_lm, whose models generate text" in evaluated


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.cache=cached", "teacher.cache: cannot be combined with rollout, whose texts are"),
        (
            "method={name: minidisc, target_sparsity: 0.5}",
            'rollout: method "minidisc" does not train on generated texts; set method.name to ',
        ),
    ],
)
def test_settings_that_need_the_training_rows_are_refused(
    run_file: Path, override: str, message: str
) -> None:
    assert message in message_of(run_file, *_TEXT, override, _rollout("max_new_tokens: 4"))


def test_a_length_holds_from_its_step_on() -> None:
    rollout = RolloutConfig(
        max_new_tokens=(
            LengthStep(from_step=0, max_new_tokens=4),
            LengthStep(from_step=10, max_new_tokens=16),
        )
    )

    assert [rollout.max_new_tokens_at(step) for step in (0, 9, 10, 99)] == [4, 4, 16, 16]
    assert rollout.longest == 16


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_text_is_staler_than_allowed_and_every_step_is_in_its_own_block(staleness: int) -> None:
    rollout = RolloutConfig(max_new_tokens=4, max_staleness=staleness, from_step=5)

    for step in range(5, 40):
        block = rollout_block(step, rollout)
        assert step in block
        assert all(rollout_block(other, rollout) == block for other in block)
        assert block[-1] - block[0] == staleness
        assert block[0] >= 5
