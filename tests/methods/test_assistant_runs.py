"""Whole runs of the schedules of teacher assistants, as a user starts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benches import Bench, furthest_students
from tiny_runs import NO_DROPOUT, bert, review_task, text_task
from transformers import AutoModelForCausalLM
from whole_run import finish, finish_in, read, records, unexplained, weights

GRID, TARGET, TRADEOFF = [0.25, 0.5, 0.75], 0.75, 0.01
STEPS, EVAL_STEPS = 8, 4


@pytest.fixture(scope="module")
def bench(one_rank, tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("assistants")
    result = Bench(
        one_rank,
        folder,
        review_task(folder),
        student={"model": "from_teacher"},
        method={"target_sparsity": TARGET, "round_to": 1},
        eval={"eval_steps": EVAL_STEPS},
        train={"per_device_train_batch_size": 8, "max_steps": STEPS},
    )
    # A cut model draws no dropout for heads that it does not have.
    teacher = result.make("teacher", bert(2, 32, num_attention_heads=4, **NO_DROPOUT), steps=30)
    result.shared["teacher"] = {"model": str(teacher)}
    return result


@pytest.fixture(scope="module")
def minidisc(bench) -> Path:
    """Two trials: with little weight on size, a wide candidate wins the first."""
    return bench.run(
        "minidisc",
        {"name": "minidisc", "sparsities": GRID, "tradeoff": TRADEOFF},
        baselines=["alone", "direct"],
        alone={"max_steps": 3},
        train={"learning_rate": 0.001},
    )


def test_every_trial_chooses_one_candidate_by_scores_of_one_evaluation(minidisc):
    candidates = read(minidisc)["candidates"]

    for iteration in {row["iteration"] for row in candidates}:
        rows = [row for row in candidates if row["iteration"] == iteration]
        assert sum(row["chosen"] for row in rows) == 1
        evaluations = [r for r in records(minidisc, f"trial-{iteration}") if "eval/accuracy" in r]
        shown = {row["sparsity"]: row["metric"] for row in rows}
        assert shown in [
            {s: evaluation[f"eval/sparsity-{s:g}/accuracy"] for s in shown}
            for evaluation in evaluations
        ]
    for row in candidates:
        assert row["tradeoff"] == pytest.approx(row["metric"] + TRADEOFF * row["sparsity"])


def test_the_student_is_the_target_cut_to_its_size(minidisc):
    report = read(minidisc)
    student = weights(minidisc / "final")
    target = next(row for row in report["candidates"] if row["sparsity"] == TARGET)

    assert sum(tensor.numel() for tensor in student.values()) == report["student.parameters"]
    assert report["student.parameters"] == target["parameters"]
    heads = sum(t.shape[0] for n, t in student.items() if n.endswith("query.weight")) // 8
    neurons = sum(t.shape[0] for n, t in student.items() if "intermediate" in n and t.dim() == 2)
    assert (heads, neurons) == (round(0.25 * 8), round(0.25 * 128))


def test_direct_is_the_target_cut_out_of_the_teacher_with_the_steps_of_all_trials(minidisc):
    student = [s["name"] for s in read(minidisc)["stages"] if s["name"].startswith("trial-")][-1]
    ours, direct, alone, start, ordered = (
        weights(minidisc / "stages" / stage)
        for stage in (student, "direct", "alone", "cut-direct", "sorted-teacher")
    )
    stages = [(stage["name"], stage["steps"]) for stage in read(minidisc)["stages"]]

    trials = sum(steps for name, steps in stages if name.startswith("trial-"))
    assert (dict(stages)["direct"], dict(stages)["alone"]) == (trials, 3)
    assert len(stages) == len(dict(stages))  # importance is measured once
    for baseline in (direct, alone):
        assert {n: t.shape for n, t in baseline.items()} == {n: t.shape for n, t in ours.items()}
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(start[embeddings], ordered[embeddings])
    assert not torch.equal(direct[embeddings], start[embeddings])
    assert set(read(minidisc)["baselines"]) == {"alone", "direct"}
    assert unexplained(minidisc) == []


def test_a_large_weight_on_size_ends_with_the_target_after_one_trial(bench):
    method = {"name": "minidisc", "tradeoff": 100.0, "iterations": 3, "passes_per_backward": 2}
    # What a model does whose moments would not fit: sharded, no state, two candidates at a time.
    sharded = {"model": "from_teacher", "deepspeed": "zero3"}
    out = bench.run("sparse", method, student=sharded, train={"optim": "sgd"})
    report = read(out)

    assert [stage["name"] for stage in report["stages"]] == ["sorted-teacher", "trial-1"]
    assert [row["sparsity"] for row in report["candidates"] if row["chosen"]] == [TARGET]
    assert report["assistants"] == []
    # What is kept is the target's own best evaluation.
    scores = [
        record[f"eval/sparsity-{TARGET}/accuracy"]
        for record in records(out, "trial-1")
        if "eval/accuracy" in record
    ]
    assert len(scores) == STEPS // EVAL_STEPS
    assert report["stages"][-1]["accuracy"] == max(scores)
    assert next(r["kept_metric"] for r in report["candidates"] if r["chosen"]) == max(scores)


def test_the_assistant_is_cut_and_teaches_the_second_trial(minidisc):
    report = read(minidisc)
    first = next(r for r in report["candidates"] if r["iteration"] == 1 and r["chosen"])

    (assistant,) = report["assistants"]
    assert report[f"{assistant}.sparsity"] == first["sparsity"] < TARGET
    assert report[f"{assistant}.parameters"] == first["parameters"]
    second = [row for row in report["candidates"] if row["iteration"] == 2]
    assert [row["sparsity"] for row in second] == [s for s in GRID if s >= first["sparsity"]]
    assert next(row["sparsity"] for row in second if row["chosen"]) == TARGET
    result = json.loads((minidisc / "stages" / "trial-2" / "result.json").read_text())
    assert result["view"] == f"sparsity-{TARGET}"


def test_one_candidate_learns_what_a_cut_model_learns_alone(bench):
    only = {"name": "minidisc", "iterations": 1, "sparsities": [TARGET]}
    trial = bench.run("single", only)
    leg = bench.run("direct", {"name": "direct"})

    assert furthest_students(trial, leg) <= 2e-5


def test_maxidisc_keeps_the_best_student_and_trains_no_finished_leg_again(bench):
    out = bench.run("maxidisc", {"name": "maxidisc", "sparsities": GRID})
    rows = read(out)["candidates"]
    (chosen,) = [row for row in rows if row["chosen"]]
    (out / "report.json").unlink()
    before = {p: p.stat().st_mtime_ns for p in out.glob("stages/*/model.safetensors")}

    outcome = finish(bench.one_rank, bench.folder / "maxidisc.yaml")

    assert [row["sparsity"] for row in rows] == GRID
    assert chosen["student_metric"] == max(row["student_metric"] for row in rows)
    assert {p: p.stat().st_mtime_ns for p in out.glob("stages/*/model.safetensors")} == before
    assert "already finished, taken from" in outcome.err
    assert len(before) == 2 * len(GRID) - 1 + 1 + 2 * len(GRID) - 1


# Families that are found by structure.


SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}


CUT = {"name": "minidisc", "round_to": 1}
CUT |= {"sparsities": [0.25, 0.5], "target_sparsity": 0.5}


@pytest.mark.parametrize(
    ("model_type", "keys", "allocation", "heads"),
    [
        ("smollm3", {"num_key_value_heads": 2}, "uniform", 2),
        ("olmo2", {"num_key_value_heads": 2}, "uniform", 4),  # norms over all of its heads
        ("gpt_neox", {}, None, None),  # no config of it states layers of different sizes
    ],
)
def test_minidisc_cuts_what_a_family_can_lose(
    one_rank, tmp_path, model_type, keys, allocation, heads
):
    teacher = {"config": {"model_type": model_type, **SIZES, **keys}}

    finish_in(
        one_rank,
        tmp_path,
        text_task(tmp_path),
        student={"model": "from_teacher"},
        teacher={"model": teacher, "finetune": {"max_steps": 4}},
        eval={"metric": "accuracy"},
        method={**CUT, **({} if allocation is None else {"allocation": allocation})},
    )

    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out / "final", trust_remote_code=True)
    assert model.num_parameters() == read(out)["student.parameters"]
    if allocation == "uniform":
        assert model.config.model_type == model_type
        sizes = model.config.num_attention_heads, model.config.intermediate_size
        assert sizes == (heads, 32)
        return
    layers = model.gpt_neox.layers
    assert sum(layer.attention.dense.in_features for layer in layers) == 32, "half of the heads"
    assert sum(layer.mlp.dense_4h_to_h.in_features for layer in layers) == 64
