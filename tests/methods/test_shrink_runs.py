"""Shrink through the real commands: the student, stops, the report, the plan, and bad sizes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    bert,
    llama,
    pairs_task,
    review_task,
    run_in,
    text_task,
    write_jsonl,
    write_text,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig
from whole_run import (
    finish,
    finish_in,
    read,
    records,
    same_weights,
    unexplained,
    weights,
)

REPAIR, STEPS = 3, 5
ROLLOUT = {"max_new_tokens": 4, "prompt_tokens": 4, "from_step": REPAIR}
TEACHER = llama(
    4, 32, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, vocab_size=320
)
ENCODER = bert(4, width=32, num_attention_heads=4, intermediate_size=64)
STUDENT = {"model": "from_teacher", "dropout": 0.0}


def shrinking(folder: Path, *, parameters: str | int = "24K", **sections: Any) -> Path:
    """A run config of a decoder whose teacher is trained for a few steps."""
    folder.mkdir(parents=True, exist_ok=True)
    text = write_text(folder / "text.txt", documents=80)
    return run_in(
        folder,
        {"type": "causal_lm", "dataset": str(text)},
        **{
            "teacher": {"model": TEACHER, "finetune": {"max_steps": 8}},
            "method": {"name": "shrink", "parameters": parameters, "round_to": 4},
            "save": {"save_steps": 1},
            "train": {"max_steps": STEPS},
            "rollout": ROLLOUT,
            "student": {"model": "from_teacher"},
            **sections,
        },
    )


def shrinking_encoder(folder: Path, **method: Any) -> Path:
    return run_in(
        folder,
        review_task(folder),
        teacher={"model": ENCODER, "finetune": {"max_steps": 8}, "cache": "auto"},
        method={"name": "shrink", "round_to": 4, **method},
        student=STUDENT,
        train={"max_steps": 4},
    )


@pytest.fixture(scope="module")
def shrunk(one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shrink")
    finish(one_rank, shrinking(folder, baselines=["random"]))
    return folder / "out"


def test_the_student_opens_as_a_stock_model_of_the_wanted_size(shrunk):
    report = read(shrunk)

    model = AutoModelForCausalLM.from_pretrained(shrunk / "final")

    assert unexplained(shrunk) == []
    assert type(model).__name__ == "LlamaForCausalLM"
    size = sum(weight.numel() for weight in model.parameters())
    assert size == report["student.parameters"] == pytest.approx(24_000, rel=0.03)
    assert (report["asked.what"], report["asked.value"]) == ("parameters", 24_000)
    layers, heads, neurons = report["student.parts"].split(" · ")
    kept = re.fullmatch(r"layers? ([\d, ]+) of 4", layers)
    assert kept
    assert len(kept[1].split(", ")) == model.config.num_hidden_layers
    groups, width = model.config.num_key_value_heads, model.config.intermediate_size
    assert heads == ("2 key-value heads" if groups == 2 else f"{groups} of 2 key-value heads")
    assert neurons == ("64 neurons" if width == 64 else f"{width} of 64 neurons")


def test_a_student_generates_with_the_settings_of_its_teacher(one_rank, shrunk, tmp_path):
    teacher = shutil.copytree(shrunk / "stages" / "teacher-finetune", tmp_path / "teacher")
    (teacher / "checksums.json").unlink()
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    eos = GenerationConfig.from_pretrained(teacher).eos_token_id
    GenerationConfig(**settings, eos_token_id=[9, eos]).save_pretrained(teacher)
    config = shrinking(
        tmp_path, teacher={"model": str(teacher)}, train={"max_steps": 1}, rollout=None
    )

    finish(one_rank, config)

    for folder in ("stages/sorted-teacher", "stages/cut", "final"):
        stored = GenerationConfig.from_pretrained(tmp_path / "out" / folder)
        assert {key: getattr(stored, key) for key in settings} == settings
        assert stored.eos_token_id == [9, eos]


def test_repair_and_generated_texts_are_one_stage_with_one_schedule(shrunk):
    by_step = {r["step"]: r for r in records(shrunk, "student") if "train/loss" in r}

    steps = {stage["name"]: stage["steps"] for stage in read(shrunk)["stages"]}
    assert steps["student"] == STEPS
    rates = [by_step[step]["train/learning_rate"] for step in sorted(by_step)]
    assert rates == sorted(rates, reverse=True)
    texts = [step for step, r in by_step.items() if any("rollout" in key for key in r)]
    assert min(texts) > REPAIR
    # The random baseline has the shape and the steps of the student.
    student, random = (
        {name: weight.shape for name, weight in weights(shrunk / "stages" / stage).items()}
        for stage in ("student", "random")
    )
    assert student == random
    assert steps["random"] == steps["student"]


def test_a_run_stopped_in_the_repair_ends_with_the_same_weights(one_rank, shrunk, tmp_path):
    config = shrinking(tmp_path)

    for stop in (("student", 1), ("student", 4)):
        assert one_rank.train("--config", config, stop_at=stop).code != 0
    finish(one_rank, config)

    assert same_weights(tmp_path / "out" / "final", shrunk / "final")


def test_the_plan_has_the_measured_layers_and_the_student(one_rank, shrunk):
    page = one_rank.megakd("plan", shrunk.parent / "run.yaml", "--tflops", "0.0001", code=0)

    assert "student" in page.out
    assert "layers: 40 forwards of a rank" in page.out


def test_the_command_writes_its_config_runs_it_and_the_config_can_be_planned(
    one_rank, shrunk, tmp_path
):
    teacher, out = shrunk / "stages" / "teacher-finetune", tmp_path / "out"
    words = ["shrink", teacher, "--data", shrunk.parent / "text.txt", "--output_dir", out]
    train = ["train.per_device_train_batch_size=4", "train.max_steps=2"]
    words += ["--parameters", "24K", "task.max_length=16", "method.round_to=4", *train]

    one_rank.megakd(*words, code=0)

    model = AutoModelForCausalLM.from_pretrained(out / "final").eval()
    assert sum(w.numel() for w in model.parameters()) == pytest.approx(24_000, rel=0.03)
    planned = one_rank.megakd("plan", out / "shrink.yaml", code=0)
    assert "student" in planned.out
    again = one_rank.megakd(*words)
    assert (again.code, again.loaded) == (0, ()), again.err


def test_another_size_of_a_model_measures_no_layer_again(one_rank, shrunk, tmp_path):
    words = ["shrink", shrunk / "stages" / "teacher-finetune", "--data", shrunk.parent / "text.txt"]
    words += ["task.max_length=15", "method.round_to=4", "train.max_steps=1", "eval.latency=false"]

    first, second = (
        one_rank.megakd(*words, "--parameters", size, "--output_dir", tmp_path / size, code=0)
        for size in ("24K", "27K")
    )

    assert len(second.loaded) == len(first.loaded) - 1
    scores = (tmp_path / size / "stages/layers/result.json" for size in ("24K", "27K"))
    one, other = (json.loads(path.read_text())["metrics"] for path in scores)
    assert one == other


@pytest.mark.parametrize(("flops", "intermediate_size"), [(0.5, 64), (0.4, 40)])
def test_the_fewest_layers_of_a_classifier_are_cut_out_and_repaired(
    one_rank, tmp_path, flops, intermediate_size
):
    finish(one_rank, shrinking_encoder(tmp_path, flops=flops))

    report = read(tmp_path / "out")
    trained = [one["name"] for one in report["stages"] if one["steps"]]
    assert trained == ["teacher-finetune", "student"]
    assert (report["asked.what"], report["asked.value"]) == ("flops", flops)
    config = json.loads((tmp_path / "out/final/config.json").read_text())
    assert config["intermediate_size"] == intermediate_size
    # Whole layers need no importance of their units.
    measured = {one["name"] for one in report["stages"]} - {*trained}
    assert ("sorted-teacher" in measured) == (intermediate_size < 64)
    assert "layers" in measured
    # The student has no dropout; its teacher answers once, as it is.
    teacher = json.loads((tmp_path / "out/stages/teacher-finetune/config.json").read_text())
    assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == 0.0
    assert teacher["hidden_dropout_prob"] == 0.1
    assert (tmp_path / "out/stages/teacher-answers").is_dir()


def test_a_decoder_that_can_lose_neurons_alone_is_shrunk_to_fewer_of_them(one_rank, tmp_path):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 320}
    teacher = llama(2, 32, tie_word_embeddings=True, **sizes)
    teacher["config"]["model_type"] = "olmo2"
    method = {"name": "shrink", "flops": "80%", "round_to": 4}
    spec = {"model": teacher, "finetune": {"max_steps": 2}}

    finish(one_rank, shrinking(tmp_path, teacher=spec, method=method, rollout=None))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    assert (type(model).__name__, model.config.num_hidden_layers) == ("Olmo2ForCausalLM", 2)
    assert model.config.intermediate_size < 64


KINDS = ["linear_attention", "linear_attention", "full_attention"] * 2
SHARED = ["sliding_attention", "sliding_attention", "full_attention"] * 2
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2}
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "gemma4_text": {
        "layer_types": SHARED,
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
        "head_dim": 8,
        "global_head_dim": 8,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "mamba", "attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        **MAMBA,
    },
    "qwen3_5_text": {
        "layer_types": KINDS,
        "head_dim": 8,
        **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    },
    "bamba": {"attn_layer_indices": [2, 5], **MAMBA},
    "falcon_h1": {"head_dim": 8, "mamba_d_ssm": 64, **MAMBA},
}
FAST = ("lfm2", "gemma4_text")
HYBRID_CASES = [
    *FAST,
    *(pytest.param(name, marks=pytest.mark.slow) for name in HYBRIDS if name not in FAST),
]


@pytest.mark.parametrize("family", HYBRID_CASES)
def test_a_hybrid_loses_layers_and_generates_with_its_cache(one_rank, tmp_path, family):
    sizes = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        **HYBRIDS[family],
    }
    teacher = llama(6, 32, tie_word_embeddings=True, **sizes)
    teacher["config"]["model_type"] = family
    spec = {"model": teacher, "finetune": {"max_steps": 2}}
    # Four of six layers have these shares of the operations.
    flops = "63%" if family == "granitemoehybrid" else "67%"
    method = {"name": "shrink", "flops": flops, "round_to": 4}

    train = {"max_steps": 2}
    finish(one_rank, shrinking(tmp_path, teacher=spec, method=method, rollout=None, train=train))

    final, report = tmp_path / "out/final", read(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(final)
    assert type(model).__module__.startswith("transformers.models.")
    assert model.config.num_hidden_layers < 6
    assert report["student.parameters"] == sum(one.numel() for one in model.parameters())
    text = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4)
    assert text.shape == (1, 7)


def test_a_first_layer_that_no_other_can_replace_stays(one_rank, tmp_path):
    """The first layer of ModernBERT has no norm of its input."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1}
    shape = {"model_type": "modernbert", "num_hidden_layers": 4, **sizes, **special}
    teacher = {"model": {"config": {**shape, "eos_token_id": 2}}, "finetune": {"max_steps": 2}}
    student = {"model": "from_teacher", "layers": 1}

    task = review_task(tmp_path, max_eval_examples=8)

    outcome = finish_in(
        one_rank, tmp_path, task, teacher=teacher, student=student, method={"name": "single"}
    )

    assert "layers are ranked on 8 held-out rows, of which chance decides" in outcome.err
    assert read(tmp_path / "out")["student.parts"].startswith("layer 1 of 4")


@pytest.mark.parametrize("kind", ["regression", "mlm"])
def test_other_tasks_of_encoders_are_shrunk_as_classifiers_are(one_rank, tmp_path, kind):
    task = pairs_task(tmp_path) if kind == "regression" else text_task(tmp_path, "mlm")
    teacher = {"model": ENCODER, "finetune": {"max_steps": 8}}
    teacher |= {"cache": "auto"} if kind == "regression" else {}
    method = {"name": "shrink", "flops": "45%", "round_to": 4}

    finish_in(one_rank, tmp_path, task, teacher=teacher, student=STUDENT, method=method)

    report = read(tmp_path / "out")
    parts = [report[f"{one}.encoder_parameters"] for one in ("student", "teacher")]
    assert parts[0] == pytest.approx(0.45 * parts[1], rel=0.05)


def test_a_budget_that_cannot_be_met_is_refused_before_rows_are_encoded(one_rank, tmp_path):
    no_model = r"no model with 0\.1% of the layers' operations .*the nearest"
    for budget, message in (
        ({"flops": "0.1%"}, no_model),
        ({"parameters": "1B"}, "give a smaller size"),
        ({"parameters": "1K"}, r"; 4,834 weights are .* launch/trim_vocabulary\.py writes a"),
    ):
        config = shrinking_encoder(tmp_path / "".join(budget.values()), **budget)
        outcome = one_rank.train("--config", config, code=2)

        assert re.search(message, outcome.err)
        assert outcome.loaded == ()
        assert "the rows have" not in outcome.err


def test_a_speed_up_is_timed_before_the_teacher_learns(one_rank, tmp_path):
    # A seventh of the weights of the layers takes more than a seventh of the time.
    outcome = one_rank.train("--config", shrinking_encoder(tmp_path, speedup=7), code=2)

    assert "no model with a speed-up of 7.00x" in outcome.err
    assert "the nearest possible sizes are a speed-up of" in outcome.err
    stages = {folder.name for folder in (tmp_path / "out" / "stages").glob("*")}
    assert "times-of-extremes" in stages
    named = r"times-of-(extremes|\d+-layers?-\d+-key-value-groups?-\d+-neurons)"
    assert all(re.fullmatch(named, name) for name in stages)
    assert re.search(
        r"\d layers?, \d key-value groups?, \d+ neurons: .* times as fast", outcome.err
    )


def test_weights_are_counted_with_the_head_that_the_labels_of_the_data_need(one_rank, tmp_path):
    """The head of the model is for two labels, and the data have sixty."""
    rows = [{"text": f"word {n % 60} and {n}", "label": f"class {n % 60}"} for n in range(240)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = shrinking_encoder(tmp_path, parameters="28K")

    few = ("teacher.finetune.max_steps=1", "train.max_steps=1")

    finish(one_rank, config, f"task.dataset={path}", *few)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "final")
    assert model.config.num_labels == 60
    assert model.num_parameters() == pytest.approx(28_000, rel=0.03)
