"""Generation with a run's own engines, on ranks and at every ZeRO stage."""

from __future__ import annotations

import equal_runs
import pytest
import torch

WEIGHTS = {"hard_cross_entropy": 0.3, "soft_target_kl": 0.7}
# GPT-2 has dropout, which draws random numbers in training.
STUDENT = {
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
def configs(tmp_path_factory):
    """(student's stage, teacher's stage) -> a run config."""
    folder = equal_runs.write_folder(tmp_path_factory.mktemp("generation"))

    def written(student_zero: int, teacher_zero: int, student=STUDENT, name: str = "gpt2") -> str:
        stages = {"student_zero": student_zero, "teacher_zero": teacher_zero}
        tree = equal_runs.config_tree(folder, "llama-tied", WEIGHTS, **stages)
        if student is not None:
            tree["student"]["model"] = student
        path = folder / f"{name}-{student_zero}-{teacher_zero}.yaml"
        return equal_runs.write(tree, path)

    return written


@pytest.fixture(scope="module")
def alone(workers, configs):
    """The completions of one rank without sharding."""
    return workers(1).run("generation_cases.completions", configs(0, 0), [])[0]


@pytest.mark.parametrize(
    ("world", "stage", "teacher_stage"),
    [(2, 0, 0), (2, 1, 0), (2, 2, 3), (2, 3, 3), (1, 3, 3), (3, 0, 3), (3, 3, 0)],
)
def test_completions_are_the_same_at_every_stage_and_on_any_number_of_ranks(
    workers, configs, alone, world, stage, teacher_stage
):
    found = workers(world).run("generation_cases.completions", configs(stage, teacher_stage), [])

    for key in ("student", "greedy", "teacher"):
        assert all(rank[key] == alone[key] for rank in found), key
    assert found[0]["one"] == alone["one"]
    assert all(rank["one"] == [] for rank in found[1:])
    assert all(rank["none"] == [] for rank in found)


def test_completions_end_at_different_positions(alone):
    lengths = {len(ids) for ids, _ in alone["student"]}

    assert len(lengths) > 1
    assert {finished for _, finished in alone["student"]} >= {True}
    assert alone["student"] != alone["teacher"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_goes_on_as_if_nothing_had_been_generated(workers, configs, stage):
    config = configs(stage, 3 if stage == 3 else 0)

    quiet = workers(2).run("generation_cases.training", config, [], 0)
    found = workers(2).run("generation_cases.training", config, [], 1)

    assert [rank["changed"] for rank in found] == [[], []]
    assert quiet[0]["weights"].keys() == found[0]["weights"].keys()
    for name, weight in quiet[0]["weights"].items():
        assert torch.equal(found[0]["weights"][name], weight), name
    first, second = found[0]["said"]
    assert first != second  # a step has changed the weights
    assert found[0]["said"] == found[1]["said"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sharded_model_is_gathered_group_by_group_into_a_copy_that_is_freed(
    workers, configs, dtype
):
    config = configs(3, 0, None, "llama")
    overrides = ["train.bf16=true"] if dtype == "bf16" else []

    found = workers(2).run("generation_cases.copy_facts", config, overrides)

    for rank in found:
        assert rank["sharded"] == (True, False)
        assert rank["open"] == (0, 0)
        assert rank["dtypes"] == {torch.bfloat16 if dtype == "bf16" else torch.float32}
        assert rank["tied"]
        assert rank["left"] == 0
    assert found[0]["whole"].keys() == found[0]["state"].keys()
    for name, weight in found[0]["state"].items():
        assert torch.equal(found[0]["whole"][name], weight), name
        assert torch.equal(found[1]["whole"][name], weight), name


def test_a_rank_without_prompts_does_not_run_the_model(workers, configs):
    counted = workers(2).run("generation_cases.calls", configs(3, 0), [])[0]

    assert counted[0] > 0
    assert counted[1] == 0


@pytest.mark.parametrize("stage", [0, 3])
def test_a_prompt_that_cannot_be_continued_fails_on_all_ranks_alike(workers, configs, stage):
    said = workers(2).run("generation_cases.refused", configs(stage, 0), [])

    assert said[0] == said[1]
    assert "prompt 0 has 1000 tokens" in said[0]
