"""A run goes on with other ranks, at another ZeRO stage and with another accumulation."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import started, summed
from equal_runs import CLASSIFICATION, LANGUAGE, ZERO3, difference
from safetensors.torch import load_file
from slow_cases import slow

from megakd.engine.sharding import gathered_state
from megakd.process.seals import write_files

ZERO2_OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
ZERO3_OFFLOADED = {
    "zero_optimization": {**ZERO3["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
}
STAGES = [{"zero_optimization": {"stage": stage}} for stage in range(3)] + [ZERO3]
# (ranks, student's DeepSpeed config, teacher's ZeRO stage); each leg takes one or two steps.
ROUTES = {
    "2-1-4-2": [(2, STAGES[2], 0), (1, STAGES[0], 3), (4, STAGES[3], 0), (2, STAGES[1], 3)],
    "4-2-1-4": [(4, STAGES[1], 0), (2, STAGES[3], 3), (1, STAGES[3], 0), (4, STAGES[0], 0)],
    # Nearly what four ranks show: a checkpoint has whole values, whoever wrote it.
    "2-1-2-2": [(2, STAGES[2], 0), (1, STAGES[0], 3), (2, STAGES[3], 0), (2, STAGES[1], 3)],
    "offload": [(1, STAGES[2], 0), (2, ZERO2_OFFLOADED, 0), (2, ZERO3_OFFLOADED, 0),
                (1, STAGES[0], 0)],
}  # fmt: skip
PLACES = [0, 2, 3, 5, 6]


def leg(config: str, before: str | None, first: int, last: int, after: str) -> dict[str, Any]:
    """Continue a student from the folder of other ranks, and save it again."""
    with started(config) as (run, _):
        if before is not None:
            run.student.load(Path(before))
        run.trainer.step = first
        losses = [
            summed(run.trainer.train_step(run.batch_source.step(step)).parts)
            for step in range(first, last)
        ]
        write_files(Path(after), run.student.files())
        values = run.student.optimizer_state
        return {
            "losses": losses,
            "weights": dict(gathered_state(run.student.bundle)),
            "values": {f"{kind}/{name}": whole for kind, name, whole in values.whole()},
            "steps": values.steps,
        }


@pytest.fixture(scope="module")
def travel(workers, write_run, tmp_path_factory):
    """Train a student of `equal_runs` along a route; return what rank 0 has at the end."""

    def train(route, name, terms, *, places=PLACES, **sections) -> dict[str, Any]:
        losses, folder, collected = [], None, {}
        for (ranks, ds, teacher), (first, last) in zip(route, pairwise(places), strict=True):
            train = {"per_device_train_batch_size": 12 // ranks, **sections.get("train", {})}
            train |= {"gradient_accumulation_steps": 1, "max_steps": places[-1]}
            given = {**sections, "train": train}
            given["student"] = {**given.get("student", {}), "deepspeed": ds}
            config = write_run(name, terms, (0, teacher), **given)
            after = str(tmp_path_factory.mktemp("saved"))
            collected = workers(ranks).run(
                "test_other_ranks.leg", config, folder, first, last, after, timeout_s=300
            )[0]
            losses, folder = [*losses, *collected["losses"]], after
        return {**collected, "losses": losses}

    return train


def assert_same(result, unbroken) -> None:
    for mine, theirs in zip(result["losses"], unbroken["losses"], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-6, abs=1e-6)
    assert difference(result["weights"], unbroken["weights"]) < 3e-6
    assert difference(result["values"], unbroken["values"]) < 3e-6
    assert result["steps"] == unbroken["steps"]


ALONE = [(1, STAGES[0], 0)]
ENDS = [PLACES[0], PLACES[-1]]


@pytest.fixture(scope="module")
def unbroken(travel) -> dict[str, Any]:
    return travel(ALONE, "bert-student", CLASSIFICATION, places=ENDS)


# The first use of DeepSpeed's CPU Adam compiles it, which takes a minute.
@pytest.mark.parametrize("route", ["2-1-2-2", *slow("2-1-4-2", "4-2-1-4", "offload")])
def test_a_student_that_changes_ranks_and_stages_learns_as_one_that_does_not(
    travel, unbroken, route
):
    assert_same(travel(ROUTES[route], "bert-student", CLASSIFICATION), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [{"train": {"optim": "sgd"}}, {"student": {"lora": {"r": 4, "alpha": 6.0}}}],
    ids=["sgd", "lora"],
)
def test_other_optimizers_and_adapters_travel_too(travel, sections):
    unbroken = travel(ALONE, "llama-tied", LANGUAGE, places=ENDS, **sections)

    assert_same(travel(ROUTES["2-1-2-2"], "llama-tied", LANGUAGE, **sections), unbroken)


@pytest.mark.parametrize("bf16", [*slow((False,)), True], ids=["fp32", "bf16"])
def test_what_other_ranks_read_is_what_was_written_to_the_last_bit(travel, bf16):
    """The fp32 weights and moments of a student in bf16 too."""
    train = {"train": {"bf16": bf16}}

    written = travel([(2, STAGES[2], 0)], "bert-student", CLASSIFICATION, places=[0, 2], **train)
    route = [(2, STAGES[2], 0), (2, STAGES[3], 0), (1, STAGES[0], 0), (2, STAGES[1], 3)]
    read = travel(route, "bert-student", CLASSIFICATION, places=[0, 2, 2, 2, 2], **train)

    for key in ("values", "weights"):
        assert difference(read[key], written[key]) == 0
    assert written["values"]["weight/learners.0.classifier.weight"].dtype == torch.float32


MINIDISC = {
    "name": "minidisc", "sparsities": [0.25, 0.5, 0.75], "target_sparsity": 0.75,
    "tradeoff": 0.0, "round_to": 2,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("world", "zero"), [(1, 0), (4, 3)])
def test_a_trial_of_minidisc_goes_on_with_other_ranks(goes_on, write_run, world, zero):
    terms = {"soft_target_kl": 0.5, "hard_cross_entropy": 0.5}
    sections = {"student": {"model": "from_teacher"}, "train": {"max_steps": 4}}
    config = write_run("bert-student", terms, (2, 3), method=MINIDISC, **sections)

    result, whole = goes_on(config, "trial-1/step-2", world=world, zero=zero)

    weights = [path.relative_to(whole) for path in whole.glob("stages/*/model.safetensors")]
    assert len(weights) > 1  # the start and the trial
    for path in weights:
        one, two = load_file(result / path), load_file(whole / path)
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
