"""Whole runs of knowledge selection and its controls, as a user starts them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_store import flip
from one_rank import Outcome
from teacher_bench import STEPS, TeacherBench
from tiny_runs import NO_DROPOUT, bert, llama, write_text
from whole_run import finish, finish_in, forgotten, read, records, same_weights, weights

EPISODES, PHASE = 2, 3
KINDS = ("hard_cross_entropy", "soft_target_kl", "hidden_mse", "relation_fsp")
PLAIN = {"name": "knowledge_selection"}
LEARNED = {**PLAIN, "episodes": EPISODES, "phase_steps": PHASE}


@pytest.fixture(scope="module")
def bench(one_rank, tmp_path_factory) -> TeacherBench:
    folder = tmp_path_factory.mktemp("selection")
    return TeacherBench(one_rank, folder, bert(4), student={"model": bert(2)})


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
    killed = forgotten(
        soft, tmp_path / "killed", stage="selector", after=10, following=("student",)
    )

    outcome = finish(bench.one_rank, bench.folder / "soft.yaml", f"output_dir={killed}")

    assert "selector: resumed at step 10" in outcome.err
    for stage in ("selector", "student"):
        assert same(killed, soft, stage)
    again, chosen = (
        [{k: v for k, v in record.items() if k.startswith("select/")} for record in logged]
        for logged in (records(killed, "selector"), records(soft, "selector"))
    )
    assert again == chosen
    selector = "stages/selector/selector.safetensors"
    assert (killed / selector).read_bytes() == (soft / selector).read_bytes()


def test_episodes_that_are_left_need_the_whole_initial_student(bench, soft, tmp_path):
    def continued(step: int, *, damaged: bool) -> Outcome:
        out = tmp_path / f"{step}-{damaged}"
        forgotten(soft, out, stage="selector", after=step, following=("student",))
        beginning = out / "checkpoints" / "selector" / "beginning"
        if damaged:
            flip(next(beginning.glob("*.pt")))
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


def test_a_saved_selector_gives_the_same_student_without_stage_1(bench, soft):
    again = bench.run("again", {**PLAIN, "selector": str(soft / "stages" / "selector")})

    assert same(again, soft)
    assert [stage["name"] for stage in read(again)["stages"]] == ["student"]


def test_a_selector_of_other_widths_or_kinds_is_refused(bench, soft):
    method = {**PLAIN, "selector": str(soft / "stages" / "selector")}
    wide = bench.config("wide", method, student={"model": bert(1, width=24)})
    few = bench.config("few", method, objective=[{"loss": "soft_target_kl"}])

    outcome = [bench.one_rank.train("--config", path) for path in (wide, few)]

    assert [one.code for one in outcome] == [2, 2]
    assert "is for a student of width 16" in outcome[0].err
    assert "this run has the widths 24 and 16" in outcome[0].err
    assert "this run has the widths 16 and 16 and soft_target_kl" in outcome[1].err


def test_every_episode_begins_with_the_same_student_and_ends_with_its_score(bench):
    """A hard action of one kind always uses it: both episodes are the same training."""
    method = {**LEARNED, "action": "hard", "episodes": 2}

    # An epoch is an episode, and the order of the rows makes no difference to a whole batch.
    whole = {"per_device_train_batch_size": 64, "max_steps": 5}

    out = bench.run(
        "episodes",
        method,
        objective=[{"loss": "soft_target_kl"}],
        train=whole,
        student={"model": bert(2, **NO_DROPOUT)},
        eval={"eval_steps": 5, "losses": True},
    )

    scored = [r["eval/soft_target_kl"] for r in records(out, "selector") if "eval/loss" in r]
    _, first, second = scored
    assert first == pytest.approx(second, abs=1e-5)
    final = [r["eval/soft_target_kl"] for r in records(out, "student") if "eval/loss" in r][-1]
    assert first == pytest.approx(final, abs=1e-5)

    both = weights(out / "stages" / "selector"), weights(out / "stages" / "student")
    assert max((both[0][n] - both[1][n]).abs().max().item() for n in both[0]) <= 1e-5


def test_all_kinds_learn_at_every_step_without_a_selector(bench):
    out = bench.run("all", {**PLAIN, "policy": "all"})

    assert [stage["name"] for stage in read(out)["stages"]] == ["student"]
    logged = [r for r in records(out, "student") if "train/loss" in r]
    for record in logged:
        parts = [record[f"train/{kind}"] for kind in KINDS]
        assert record["train/loss"] == pytest.approx(sum(parts), rel=1e-4)


def test_a_labelled_row_weighs_as_a_row_of_the_soft_targets_where_others_lack_labels(bench):
    per_label: list[dict[str, Any]] = [{"loss": kind} for kind in KINDS]
    per_row = [per_label[0] | {"count": "rows"}, *per_label[1:]]
    method, few = {**PLAIN, "policy": "all"}, "task.labelled_examples=12"

    default = bench.run("default", method, few)

    per_row_run = bench.run("per-row", method, few, objective=per_row)
    assert same_weights(default / "final", per_row_run / "final")
    per_label_run = bench.run("per-label", method, few, objective=per_label)
    assert not same_weights(default / "final", per_label_run / "final")


def test_random_weights_are_drawn_anew_at_every_step(bench):
    method = {**PLAIN, "policy": "random_soft"}
    out = bench.run("random", method, log={"logging_steps": 1})

    logged = [r for r in records(out, "student") if "train/loss" in r]
    assert all(f"train/{kind}" in record for record in logged for kind in KINDS)
    parts = torch.tensor([[record[f"train/{kind}"] for kind in KINDS] for record in logged])
    losses = torch.tensor([record["train/loss"] for record in logged])
    assert (losses < parts.sum(1)).all()
    # No weights that stay the same give all these losses.
    same_weights = torch.linalg.lstsq(parts, losses[:, None]).solution
    assert torch.dist(parts @ same_weights, losses[:, None]) > 0.01 * losses.norm()


def test_kinds_of_a_language_model_are_weighed_too(one_rank, tmp_path):
    kinds = ("hard_cross_entropy", "soft_target_kl")
    text = {"type": "causal_lm", "dataset": str(write_text(tmp_path / "text.txt"))}

    finish_in(
        one_rank,
        tmp_path,
        {**text, "tokenizer": {"type": "bpe", "vocab_size": 320}},
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
