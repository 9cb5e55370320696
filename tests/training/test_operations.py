"""The operations of teachers and students, by closed form, and their rates in the log."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import NO_DROPOUT, bert, run_in, write_jsonl
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from whole_run import finish, records

from megakd.data.batch import Pass
from megakd.models.views import View
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.meter import StepWork, peak_tflops, work_of

LENGTH, ROWS = 16, 4
SIZES = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12}
LLAMA = {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 2}
ATTENTION, NEURON, HEAD = 4 * 8 * 8, 3 * 8, 50 * 8


def model_of(model_type: str = "llama", **changes: Any) -> Any:
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**LLAMA | changes))


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_is_multiplied_with_all_matrices_but_the_table_it_reads(tied):
    model = model_of(tie_word_embeddings=tied)
    weights, columns = 2 * (ATTENTION + 12 * NEURON) + HEAD, 2 * 8

    assert work_of(model) == (weights, columns)
    # A step is three forwards, and two of weights that are frozen.
    assert work_of(model, learns=True) == (3 * weights, 3 * columns)
    model.model.layers[0].mlp.requires_grad_(requires_grad=False)
    assert work_of(model, learns=True) == (3 * weights - 12 * NEURON, 3 * columns)


def test_a_view_is_as_small_as_its_cut_and_a_token_meets_a_few_experts():
    view = View(heads=(1, 2), neurons=(6, 0))
    kept = ATTENTION // 2 + 6 * NEURON + ATTENTION
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    router, norms = 4 * 8, {"head_dim": 4, "num_key_value_heads": 2}

    routed = work_of(model_of("qwen3_moe", **experts, **norms))[0]

    assert work_of(model_of(), view)[0] == kept + HEAD
    assert routed == 2 * (ATTENTION + router + 2 * 12 * NEURON) + HEAD


def test_every_view_is_a_forward_of_the_student_and_rows_of_a_teacher_are_its_own():
    student, teacher, view = model_of(), model_of(num_hidden_layers=1), View((1, 1), (6, 6))
    roles = {"by_role": {"student": student}, "role": "student", "student": student}
    bundle = SimpleNamespace(**roles, views={"half": view})
    frozen = FrozenTeacher.__new__(FrozenTeacher)
    frozen._engine = SimpleNamespace(module=SimpleNamespace(model=teacher))
    teachers = {"a": frozen, "b": frozen, "cached": object()}
    trainer: Any = SimpleNamespace(student=SimpleNamespace(bundle=bundle), teachers=teachers)
    # 12 tokens, each of which attends to the 3 of its row.
    counts = {"tokens": 12, "examples": 4, "targets": 12}
    work = (work_of(student), work_of(student, view), work_of(teacher))
    whole, half, other = (12 * (2 * weights + 4 * columns * 3) for weights, columns in work)

    def of(*plan: Pass, divides_rows: bool = False) -> tuple[float, float]:
        return StepWork(trainer, divides_rows=divides_rows).operations(plan, counts)

    assert of(Pass(teacher="a"), Pass(teacher="b")) == (3 * whole, 2 * other)
    assert of(Pass(teacher="a", view="half"), Pass(teacher="a")) == (3 * (whole + half), other)
    assert of(Pass(teacher="cached")) == (3 * whole, 0)
    # The student without its adapters.
    assert of(Pass(teacher="base")) == (3 * whole, whole)
    both = of(Pass(teacher="a"), Pass(teacher="b"), divides_rows=True)
    assert both == (3 * whole, pytest.approx(other))


def test_the_peak_of_a_device_is_known_by_its_name():
    peaks = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA L40S": 362.0}
    peaks |= {"NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA L4": 121.0, "Intel(R) Xeon(R)": None}
    assert {device: peak_tflops(device) for device in peaks} == peaks


def test_the_rates_of_a_log_are_those_of_the_plan(tmp_path, one_rank):
    words = " ".join(["good"] * (LENGTH - 2))
    rows = [{"text": words, "label": name} for name in ("a", "b")] * 20
    data = write_jsonl(tmp_path / "data/train.jsonl", rows).parent
    write_jsonl(data / "validation.jsonl", rows)
    config = run_in(
        tmp_path,
        {"type": "classification", "dataset": str(data), "max_length": LENGTH},
        teacher={"model": bert(3, 32, **NO_DROPOUT)},
        student={"model": bert(2, **NO_DROPOUT)},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl"}],
        train={"max_steps": 3, "per_device_train_batch_size": ROWS},
        log={"logging_steps": 1},
    )

    finish(one_rank, config)

    logs = [log for log in records(tmp_path / "out", "student") if "train/loss" in log]
    plan = json.loads(one_rank.megakd("plan", config, "--json").out)
    planned = next(p["flops_per_step"] for p in plan["phases"] if p["flops_per_step"])
    for log in logs:
        seconds = 1e12 * log["train/step_seconds"]
        done = seconds * (log["train/student_tflops"] + log["train/teacher_tflops"])
        assert done == pytest.approx(planned, rel=0.06)  # the pooler counts by token
        assert log["train/teacher_tflops"] > log["train/student_tflops"]
