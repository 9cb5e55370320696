"""Generation with a run's own engines, on ranks and at every ZeRO stage."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from cases import started
from equal_runs import difference
from slow_cases import slow

from megakd.config.sections import Sampling
from megakd.engine import collectives, distributed
from megakd.engine.sharding import gathered_state, is_sharded, whole_model
from megakd.errors import MegakdError
from megakd.models import generation
from megakd.models.end_tokens import TextTokens
from megakd.training.generated_texts import LocalGenerator

PROMPTS = [[5, 6, 7], [8], [12, 3, 14, 5, 6], [9, 9], [60, 50, 40, 30]]
SAMPLING, GREEDY = Sampling(10), Sampling(10, temperature=0)
ENDS = frozenset(range(20, 120))  # so many that completions end at different positions


def generated(engine: Any, prompts: list, numbers: Any, sampling: Sampling = SAMPLING) -> list:
    generator = LocalGenerator(engine, tokens=TextTokens(ENDS), rows_at_once=2)
    return generator.begin(prompts, [*numbers], sampling)()


def joined(engine: Any, sampling: Sampling = SAMPLING) -> list:
    """The completions of all ranks, in the order of the prompts; some ranks may have none."""
    ranks = distributed.ranks()
    rows = range(ranks.rank, len(PROMPTS), ranks.world_size)
    answer = generated(engine, [PROMPTS[row] for row in rows], rows, sampling)
    texts: dict = {}
    for part in collectives.gather(dict(zip(rows, answer, strict=True))):
        texts |= part
    return [(texts[row].ids, texts[row].finished) for row in range(len(PROMPTS))]


def completions(config_path: str, overrides: list[str]) -> dict:
    """The completions of the student before training, of one prompt, of none, and the teacher's.

    forwards: those of this rank for the one prompt.
    """
    prompts = PROMPTS[:1] if distributed.ranks().is_main else []
    forwards, real = [], generation.continued

    def counting(model: Any, *arguments: Any) -> Any:
        model.register_forward_pre_hook(lambda *_: forwards.append(1))
        return real(model, *arguments)

    with started(config_path, overrides) as (run, teacher):
        texts = {
            "student": joined(run.student, GREEDY),
            "teacher": joined(teacher, GREEDY),
            "none": generated(run.student, [], []),
        }
        with patch.object(generation, "continued", counting):
            texts["one"] = generated(run.student, prompts, range(len(prompts)), GREEDY)
        return {**texts, "forwards": len(forwards)}


def training(config_path: str, overrides: list[str], *, generates: bool) -> dict:
    """Two steps, with generations before each or without; the weights, rank 0's."""
    answers = []
    with started(config_path, overrides) as (run, teacher):
        for step in range(2):
            batches = run.batch_source.step(step)
            run.student.predict(batches[0])  # leaves some weights gathered at ZeRO 3
            run.student.bundle.train()
            if generates:
                answers.append(joined(run.student))
                joined(teacher)
            run.trainer.train_step(batches)
        return {"weights": dict(gathered_state(run.student.bundle)), "said": answers}


def copied(config_path: str, overrides: list[str]) -> tuple[set, dict, dict]:
    """The dtypes of a whole copy of the sharded student, its weights, and those of the student."""
    with started(config_path, overrides) as (run, _):
        student = run.student.student
        assert gathered_elements(student) == 0
        with patch("megakd.engine.sharding.GROUP_ELEMENTS", 1000), whole_model(student) as whole:
            assert (is_sharded(student), is_sharded(whole)) == (True, False)
            assert gathered_elements(student) == 0
            assert whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
            weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
        assert gathered_elements(whole) == 0
        return {p.dtype for p in weights.values()}, weights, dict(gathered_state(student))


def gathered_elements(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def refused(config_path: str, overrides: list[str]) -> str:
    """The error of every rank if the prompt of one rank is too long, and generation after it."""
    answer = ""
    with started(config_path, overrides) as (run, _):
        try:
            generated(run.student, [[3] * (1000 if distributed.ranks().is_main else 1)], [0])
        except MegakdError as error:
            answer = str(error)
        assert len(joined(run.student)) == len(PROMPTS)
    return answer


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
    return lambda *stages: write_run("llama-tied", WEIGHTS, stages, student={"model": GPT2})


@pytest.fixture(scope="module")
def alone(workers, config_of):
    return workers(1).run("test_generation.completions", config_of(0, 0), [])[0]


# (ranks, ZeRO stages of student and teacher)
SLOW = [(2, 0, 0), (2, 2, 3), (1, 3, 3), (3, 3, 0)]


@pytest.mark.parametrize(("world", "stage", "teacher_stage"), [(2, 3, 3), *slow(*SLOW)])
def test_completions_are_the_same_at_every_stage_and_on_any_number_of_ranks(
    workers, config_of, alone, world, stage, teacher_stage
):
    result = workers(world).run("test_generation.completions", config_of(stage, teacher_stage), [])

    for key in ("student", "teacher"):
        assert all(rank[key] == alone[key] for rank in result), key
    assert result[0]["one"] == alone["one"]
    assert all(rank["one"] == [] for rank in result[1:])
    assert all(rank["none"] == [] for rank in result)
    # A rank without prompts does not run the model.
    assert [rank["forwards"] > 0 for rank in result] == [True, *[False] * (world - 1)]
    # They end at different positions, and the teacher continues otherwise.
    assert len({len(ids) for ids, _ in alone["student"]}) > 1
    assert any(finished for _, finished in alone["student"])
    assert alone["student"] != alone["teacher"]


@pytest.mark.parametrize("stage", [*slow(0, 2), 3])
def test_training_goes_on_as_if_nothing_had_been_generated(workers, config_of, stage):
    config = config_of(stage, 3 if stage == 3 else 0)

    quiet = workers(2).run("test_generation.training", config, [], generates=False)
    result = workers(2).run("test_generation.training", config, [], generates=True)

    assert difference(result[0]["weights"], quiet[0]["weights"]) == 0
    first, second = result[0]["said"]
    assert first != second  # a step has changed the weights
    assert result[0]["said"] == result[1]["said"]


@pytest.mark.parametrize("dtype", [*slow("fp32"), "bf16"])
def test_a_sharded_model_is_gathered_group_by_group_into_a_copy_that_is_freed(
    workers, write_run, dtype
):
    config = write_run("llama-tied", WEIGHTS, (3, 0), train={"bf16": dtype == "bf16"})

    result = workers(2).run("test_generation.copied", config, [])

    for dtypes, weights, _ in result:
        assert dtypes == {torch.bfloat16 if dtype == "bf16" else torch.float32}
        assert difference(weights, result[0][-1]) == 0


def test_a_prompt_that_cannot_be_continued_fails_on_all_ranks_alike(workers, config_of):
    answer = workers(2).run("test_generation.refused", config_of(3, 0), [])

    assert answer[0] == answer[1]
    assert "prompt 0 has 1000 tokens" in answer[0]
