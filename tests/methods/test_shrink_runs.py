"""Shrink through the real commands: the student, stops, the report, the plan, and bad sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import llama, run_in, write_text
from transformers import AutoModelForCausalLM, GenerationConfig
from whole_run import finish, read, records, same_weights, weights

KL = "soft_target_kl"

SHAPE = {"target_sparsity": 0.5, "candidates": 3, "round_to": 4}
STEPS = {"trial_steps": 3, "repair_steps": 3, "on_policy_steps": 2}
METHOD = {"name": "shrink", **SHAPE, **STEPS}
ROLLOUT = {"max_new_tokens": 4, "prompt_tokens": 4}
TEACHER = llama(
    4, 32, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, vocab_size=320
)


def shrinking(folder: Path, **sections: Any) -> Path:
    """A run config of a teacher that is trained for a few steps."""
    folder.mkdir(parents=True, exist_ok=True)
    text = write_text(folder / "text.txt", documents=80)
    method = {**METHOD, **sections.pop("method", {})}
    return run_in(
        folder,
        {"type": "causal_lm", "dataset": str(text)},
        teacher={"model": TEACHER, "finetune": {"max_steps": 8}},
        method=method,
        save={"save_steps": 1},
        **({"rollout": ROLLOUT} if method["on_policy_steps"] else {}),
        student={"model": "from_teacher"},
        **sections,
    )


@pytest.fixture(scope="module")
def shrunk(one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shrink")
    finish(one_rank, shrinking(folder, baselines=["random"]))
    return folder / "out"


def test_the_student_opens_as_a_stock_model_of_the_wanted_size(shrunk):
    report = read(shrunk)

    model = AutoModelForCausalLM.from_pretrained(shrunk / "final")

    size = sum(weight.numel() for weight in model.parameters())
    assert type(model).__name__ == "LlamaForCausalLM"
    assert size == report["student.parameters"]
    assert size == pytest.approx(0.5 * report["teacher.parameters"], rel=0.03)


def test_a_student_generates_with_the_settings_of_its_teacher(one_rank, shrunk, tmp_path):
    teacher = shutil.copytree(shrunk / "stages" / "teacher-finetune", tmp_path / "teacher")
    (teacher / "checksums.json").unlink()
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    eos = GenerationConfig.from_pretrained(teacher).eos_token_id
    GenerationConfig(**settings, eos_token_id=[9, eos]).save_pretrained(teacher)
    steps = {"trial_steps": 1, "repair_steps": 1, "on_policy_steps": 0}

    of_file = (f"teacher.model={teacher}", "teacher.finetune=null")
    finish(one_rank, shrinking(tmp_path, method=steps), *of_file)

    for folder in ("stages/specification", "stages/trial-1", "final"):
        kept = GenerationConfig.from_pretrained(tmp_path / "out" / folder)
        assert {key: getattr(kept, key) for key in settings} == settings
        assert kept.eos_token_id == [9, eos]


def test_candidates_of_one_size_go_from_width_to_depth_and_the_lowest_divergence_wins(shrunk):
    rows = read(shrunk)["candidates"]
    trial = json.loads((shrunk / "stages" / "trial-1" / "result.json").read_text())
    (best,) = [row for row in rows if row["chosen"]]

    sizes = [row["parameters"] for row in rows]
    assert len(rows) == 3
    assert max(sizes) <= 1.03 / 0.97 * min(sizes)
    assert best["metric"] == min(row["metric"] for row in rows)
    scores = {view: scored[KL] for view, scored in trial["scores"].items()}
    assert scores[trial["view"]] == trial["metrics"][KL] == min(scores.values())
    depths = [int(row["shape"].split()[0]) for row in rows]
    assert depths == sorted(depths, reverse=True)
    final = json.loads((shrunk / "final" / "config.json").read_text())
    assert f"{final['num_hidden_layers']} layers" in best["shape"]
    assert f"{final['intermediate_size']} neurons" in best["shape"]


def test_repair_and_on_policy_are_one_stage_with_one_schedule(shrunk):
    logged = [r for r in records(shrunk, "student") if "train/loss" in r]
    by_step = {r["step"]: r for r in logged}

    report = read(shrunk)
    (stage,) = [s for s in report["stages"] if s["name"] == "student"]
    assert stage["steps"] == 5
    rates = [by_step[step]["train/learning_rate"] for step in sorted(by_step)]
    assert rates == sorted(rates, reverse=True)
    texts = [step for step, r in by_step.items() if any("rollout" in key for key in r)]
    assert texts
    assert min(texts) > METHOD["repair_steps"]


def test_the_random_baseline_has_the_shape_and_the_steps_of_the_student(shrunk):
    steps = {stage["name"]: stage["steps"] for stage in read(shrunk)["stages"]}
    student, random = (
        {name: weight.shape for name, weight in weights(shrunk / "stages" / stage).items()}
        for stage in ("student", "random")
    )

    assert student == random
    assert steps["random"] == steps["trial-1"] + steps["student"]


def test_a_run_stopped_in_the_trial_and_the_repair_ends_with_the_same_weights(
    one_rank, shrunk, tmp_path
):
    config = shrinking(tmp_path)

    for stop in (("trial-1", 2), ("student", 1), ("student", 4)):
        assert one_rank.train("--config", config, stop_at=stop).code != 0
    finish(one_rank, config)

    assert same_weights(tmp_path / "out" / "final", shrunk / "final")


@pytest.mark.slow
def test_an_assistant_is_cut_and_repaired_before_the_student(one_rank, tmp_path):
    config = shrinking(
        tmp_path, method={"target_sparsity": 0.62, "assistant": "auto_2.5", "on_policy_steps": 0}
    )

    finish(one_rank, config)

    report = read(tmp_path / "out")
    trained = [stage["name"] for stage in report["stages"] if stage["steps"]]
    assert trained == ["teacher-finetune", "trial-1", "assistant-1", "trial-2", "student"]
    sizes = [report[f"{model}.parameters"] for model in ("teacher", "student")]
    middle = report["assistant-1.parameters"]
    assert sizes[0] > middle > sizes[1]
    assert middle**2 == pytest.approx(sizes[0] * sizes[1], rel=0.1)


def test_the_plan_has_the_trial_and_the_student(one_rank, shrunk):
    page = one_rank.megakd("plan", shrunk.parent / "run.yaml", "--tflops", "0.0001", code=0)

    assert "trial-1" in page.out
    assert "layers: 40 forwards of a rank" in page.out


def test_the_command_writes_its_config_runs_it_and_the_config_can_be_planned(
    one_rank, shrunk, tmp_path
):
    teacher, out = shrunk / "stages" / "teacher-finetune", tmp_path / "out"
    words = ["shrink", teacher, "--data", shrunk.parent / "text.txt", "--output_dir", out]
    train = ["train.per_device_train_batch_size=4", "method.repair_steps=2"]
    words += ["--parameters", "24K", "task.max_length=16", "method.round_to=4", *train]

    one_rank.megakd(*words, code=0)

    model = AutoModelForCausalLM.from_pretrained(out / "final").eval()
    assert sum(w.numel() for w in model.parameters()) == pytest.approx(24_000, rel=0.03)
    planned = one_rank.megakd("plan", out / "shrink.yaml", code=0)
    assert "student" in planned.out
    again = one_rank.megakd(*words)
    assert (again.code, again.loaded) == (0, ()), again.err
