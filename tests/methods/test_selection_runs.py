"""Whole runs of knowledge selection and its controls, as a user starts them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from benches import Bench, furthest
from checkpoint_store import flip
from one_rank import Outcome
from tiny_runs import NO_DROPOUT, bert, llama, review_task, text_task
from whole_run import finish_in, forgotten, read, records, same_weights, weights

STEPS, EPISODES, PHASE = 8, 2, 3
KINDS = ("hard_cross_entropy", "soft_target_kl", "hidden_mse", "relation_fsp")
KL = [{"loss": "soft_target_kl"}]
PLAIN = {"name": "knowledge_selection"}
LEARNED = {**PLAIN, "episodes": EPISODES, "phase_steps": PHASE}


@pytest.fixture(scope="module")
def bench(one_rank, tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("selection")
    train = {"per_device_train_batch_size": 8, "max_steps": STEPS}
    task, student = review_task(folder), {"model": bert(2)}
    result = Bench(one_rank, folder, task, student=student, train=train)
    result.shared["teacher"] = {"model": str(result.make("teacher", bert(4), steps=30))}
    return result


@pytest.fixture(scope="module")
def soft(bench) -> Path:
    return bench.run("soft", LEARNED, save={"save_steps": 5})


def same(one: Path, other: Path, stage: str = "student") -> bool:
    return same_weights(*(out / "stages" / stage for out in (one, other)))


def test_weights_rewards_and_losses_are_logged_and_drawn(bench, soft):
    stage_1, stage_2 = (records(soft, stage) for stage in ("selector", "student"))
    page = bench.one_rank.page(soft)

    for stage in (stage_1, stage_2):
        logged = [record for record in stage if f"select/{KINDS[0]}" in record]
        assert logged
        assert all(0 <= record[f"select/{kind}"] <= 1 for record in logged for kind in KINDS)
        assert len({record[f"select/{KINDS[0]}"] for record in logged}) > 1
    assert any("select/reward" in record for record in stage_1)
    assert not any("select/reward" in record for record in stage_2)
    assert ">select: " in page


def test_a_run_that_goes_on_chooses_what_it_would_have_chosen(bench, soft, tmp_path):
    """Killed in the second episode, within a phase that another is waiting to learn from."""
    killed = bench.continued("soft", tmp_path, "selector", 10, ("student",))

    for stage in ("selector", "student"):
        assert same(killed, soft, stage)
    again, chosen = (
        [{k: v for k, v in r.items() if k.startswith("select/")} for r in records(out, "selector")]
        for out in (killed, soft)
    )
    assert again == chosen
    ours, theirs = (out / "stages/selector/selector.safetensors" for out in (killed, soft))
    assert ours.read_bytes() == theirs.read_bytes()


def test_episodes_that_are_left_need_the_whole_initial_student(bench, soft, tmp_path):
    def continued(step: int, *, damaged: bool) -> Outcome:
        out = tmp_path / f"{step}-{damaged}"
        forgotten(soft, out, stage="selector", after=step, following=("student",))
        beginning = out / "checkpoints" / "selector" / "beginning"
        if damaged:
            flip(next(beginning.rglob("engine-*.pt")))
        else:
            shutil.rmtree(beginning)
        return bench.one_rank.train("--config", bench.folder / "soft.yaml", f"output_dir={out}")

    damaged, missing = (continued(5, damaged=damaged) for damaged in (True, False))
    # No episode begins after step 10 of 16.
    unneeded = continued(10, damaged=False)
    assert [damaged.code, missing.code, unneeded.code] == [2, 2, 0]
    assert "beginning is damaged" in damaged.err
    assert "beginning is damaged" in missing.err


@pytest.mark.parametrize(
    "method", [{**LEARNED, "action": "hard", "episodes": 1}, {**PLAIN, "policy": "random_hard"}]
)
def test_held_out_losses_decide_nothing_and_have_all_kinds(bench, method):
    name, whole = method.get("policy", "learned"), {"student": {"model": bert(2, **NO_DROPOUT)}}

    plain = bench.run(f"{name}-plain", method, **whole)
    losses = {"eval_steps": 2, "losses": True, "keep_best": False}
    measured = bench.run(f"{name}-measured", method, eval=losses, **whole)

    assert same(measured, plain)
    evaluated = [r for r in records(measured, "student") if "eval/loss" in r]
    assert len(evaluated) == STEPS / 2 + 1
    assert all(record[f"eval/{kind}"] > 0 for record in evaluated for kind in KINDS)


def test_every_episode_begins_with_the_same_student_and_ends_with_its_score(bench):
    """A hard action of one kind always uses it: both episodes are the same training."""
    out = bench.run(
        "episodes",
        {**LEARNED, "action": "hard"},
        objective=KL,
        # An epoch is an episode, and the order of the rows makes no difference to a whole batch.
        train={"per_device_train_batch_size": 64, "max_steps": 5},
        student={"model": bert(2, **NO_DROPOUT)},
        eval={"eval_steps": 5, "losses": True},
    )

    (_, first, second), (*_, final) = (
        [r["eval/soft_target_kl"] for r in records(out, stage) if "eval/loss" in r]
        for stage in ("selector", "student")
    )
    assert first == pytest.approx(second, abs=1e-5)
    assert first == pytest.approx(final, abs=1e-5)
    both = (weights(out / "stages" / stage) for stage in ("selector", "student"))
    assert furthest(*both) <= 1e-5


def test_a_labelled_row_weighs_as_a_row_of_the_soft_targets_where_others_lack_labels(bench):
    per_label: list[dict[str, Any]] = [{"loss": kind} for kind in KINDS]
    per_row = [per_label[0] | {"count": "rows"}, *per_label[1:]]
    method, few = {**PLAIN, "policy": "random_soft"}, "task.labelled_examples=12"

    default, rows, labels = (
        bench.run(out, method, few, train={"max_steps": 3}, **objective)
        for out, objective in {
            "default": {},
            "per-row": {"objective": per_row},
            "per-label": {"objective": per_label},
        }.items()
    )

    assert same(rows, default)
    assert not same(labels, default)


def test_random_weights_are_drawn_anew_at_every_step(bench):
    method = {**PLAIN, "policy": "random_soft"}
    out = bench.run("random", method, log={"logging_steps": 1})

    assert [stage["name"] for stage in read(out)["stages"]] == ["student"]
    logged = [r for r in records(out, "student") if "train/loss" in r]
    parts = torch.tensor([[record[f"train/{kind}"] for kind in KINDS] for record in logged])
    losses = torch.tensor([record["train/loss"] for record in logged])
    assert (losses < parts.sum(1)).all()
    # No weights that stay the same give all these losses.
    constant = torch.linalg.lstsq(parts, losses[:, None]).solution
    assert torch.dist(parts @ constant, losses[:, None]) > 0.01 * losses.norm()


def test_kinds_of_a_language_model_are_weighed_too(one_rank, tmp_path):
    kinds = ("hard_cross_entropy", "soft_target_kl")

    finish_in(
        one_rank,
        tmp_path,
        text_task(tmp_path),
        teacher={"model": llama(2, initializer_range=0.2)},
        method={**LEARNED, "episode_steps": 4, "phase_steps": 2, "action": "hard"},
        objective=[{"loss": kind} for kind in kinds],
        log={"logging_steps": 1},
    )

    for stage in ("selector", "student"):
        logged = [r for r in records(tmp_path / "out", stage) if "train/loss" in r]
        assert logged
        assert {record[f"select/{kind}"] for record in logged for kind in kinds} <= {0, 1}
        exclusive = [r for r in logged if sum(r[f"select/{kind}"] for kind in kinds) == 1]
        # The noise of the first phase puts both kinds below the threshold: the larger is used.
        assert exclusive or stage == "student"
        for record in exclusive:
            (only,) = (kind for kind in kinds if record[f"select/{kind}"])
            assert record["train/loss"] == pytest.approx(record[f"train/{only}"], rel=1e-5)
