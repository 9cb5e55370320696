"""Generation with a run's own engines, on ranks and at every ZeRO stage."""

from __future__ import annotations

import pytest
import torch
from equal_runs import difference

WEIGHTS = {"hard_cross_entropy": 0.3, "soft_target_kl": 0.7}
# GPT-2 has dropout, which draws random numbers in training.
GPT2 = {
    "config": {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "vocab_size": 320,
        "initializer_range": 0.5,
    }
}


@pytest.fixture(scope="module")
def config_of(write_run):
    """The ZeRO stages of student and teacher -> a run config."""
    return lambda *stages: write_run("llama-tied", WEIGHTS, stages, student={"model": GPT2})


@pytest.fixture(scope="module")
def alone(workers, config_of):
    """The completions of one rank without sharding."""
    return workers(1).run("generation_cases.completions", config_of(0, 0), [])[0]


@pytest.mark.parametrize(
    ("world", "stage", "teacher_stage"),
    [(2, 0, 0), (2, 1, 0), (2, 2, 3), (2, 3, 3), (1, 3, 3), (3, 0, 3), (3, 3, 0)],
)
def test_completions_are_the_same_at_every_stage_and_on_any_number_of_ranks(
    workers, config_of, alone, world, stage, teacher_stage
):
    found = workers(world).run("generation_cases.completions", config_of(stage, teacher_stage), [])

    for key in ("student", "greedy", "teacher"):
        assert all(rank[key] == alone[key] for rank in found), key
    assert found[0]["one"] == alone["one"]
    assert all(rank["one"] == [] for rank in found[1:])
    assert all(rank["none"] == [] for rank in found)
    # They end at different positions, and the teacher continues otherwise.
    assert len({len(ids) for ids, _ in alone["student"]}) > 1
    assert any(finished for _, finished in alone["student"])
    assert alone["student"] != alone["teacher"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_goes_on_as_if_nothing_had_been_generated(workers, config_of, stage):
    config = config_of(stage, 3 if stage == 3 else 0)

    quiet = workers(2).run("generation_cases.training", config, [], 0)
    found = workers(2).run("generation_cases.training", config, [], 1)

    assert [rank["changed"] for rank in found] == [[], []]
    assert difference(found[0]["weights"], quiet[0]["weights"]) == 0
    first, second = found[0]["said"]
    assert first != second  # a step has changed the weights
    assert found[0]["said"] == found[1]["said"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sharded_model_is_gathered_group_by_group_into_a_copy_that_is_freed(
    workers, write_run, dtype
):
    config = write_run("llama-tied", WEIGHTS, (3, 0), train={"bf16": dtype == "bf16"})

    found = workers(2).run("generation_cases.copy_facts", config, [])

    for rank in found:
        assert rank["sharded"] == (True, False)
        assert rank["gathered"] == (0, 0)
        assert rank["dtypes"] == {torch.bfloat16 if dtype == "bf16" else torch.float32}
        assert rank["tied"]
        assert rank["left"] == 0
    for rank in found:
        assert difference(rank["whole"], found[0]["state"]) == 0


def test_a_rank_without_prompts_does_not_run_the_model(workers, config_of):
    counted = workers(2).run("generation_cases.calls", config_of(3, 0), [])[0]

    assert counted[0] > 0
    assert counted[1] == 0


@pytest.mark.parametrize("stage", [0, 3])
def test_a_prompt_that_cannot_be_continued_fails_on_all_ranks_alike(workers, config_of, stage):
    said = workers(2).run("generation_cases.refused", config_of(stage, 0), [])

    assert said[0] == said[1]
    assert "prompt 0 has 1000 tokens" in said[0]
