"""Runs with student.lora: the merged student, its adapters, the report, and refused settings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import OneRank
from peft import PeftModel
from safetensors.torch import load_file
from tiny_runs import llama, run_in, save_tokenizer, write_text
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig
from whole_run import finish, finish_in, metrics_of, of_model, read, records

from megakd.config.file import load_config
from megakd.errors import ConfigError
from megakd.models.lora import ADAPTER

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
LORA = {"r": 4, "alpha": 16.0}


def write_base(folder: Path, text: Path) -> Path:
    """A causal language model of random weights with its tokenizer, as a base has one."""
    save_tokenizer(folder, text.read_text().split("\n\n"), kind="bpe")
    keys = {k: v for k, v in llama(2)["config"].items() if k != "model_type"}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**keys, vocab_size=300)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    """A text and a base model."""
    folder = tmp_path_factory.mktemp("lora")
    write_base(folder / "base", write_text(folder / "text.txt"))
    return folder


def run_of(scene: Path, folder: Path, *, student: Any = None, **sections: Any) -> Path:
    base = {"model": str(scene / "base")}
    usual = {"teacher": base, "method": {"name": "single"}, "eval": {"eval_steps": 2}}
    return run_in(
        folder,
        {"type": "causal_lm", "train_files": str(scene / "text.txt")},
        student={**base, "lora": LORA, **(student or {})},
        objective=[{"loss": "hard_cross_entropy"}, {"loss": "soft_target_kl"}],
        **{**usual, **sections},
    )


@pytest.fixture(scope="module")
def run(one_rank: OneRank, scene: Path) -> Path:
    """The output folder of a finished run that keeps its best evaluation and has a baseline."""
    finish(one_rank, run_of(scene, scene, baselines=["alone"]))
    return scene / "out"


def test_the_student_opens_with_transformers_and_its_adapters_open_on_the_base(scene, run):
    merged = AutoModelForCausalLM.from_pretrained(run / "final")
    base = AutoModelForCausalLM.from_pretrained(scene / "base")
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, run / "final" / ADAPTER).eval()
        logits, expected = merged(ids).logits, adapted(ids).logits

    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, before, atol=1e-3)


def test_the_report_counts_trained_and_all_weights(one_rank, run):
    student = of_model(read(run), "student")

    adapters = load_file(run / "final" / ADAPTER / "adapter_model.safetensors")
    whole = load_file(run / "final" / "model.safetensors")
    assert student["trained_parameters"] == sum(t.numel() for t in adapters.values())
    assert student["parameters"] == sum(t.numel() for t in whole.values())
    assert "PeftModel.from_pretrained(" in (run / "final" / "README.md").read_text()
    assert "as adapters (LoRA)" in one_rank.page(run)


def test_the_first_loss_is_that_of_the_base_and_training_lowers_it(run):
    logged = [r for r in records(run, "student") if "train/loss" in r]
    assert logged[-1]["train/hard_cross_entropy"] < logged[0]["train/hard_cross_entropy"]
    assert logged[0]["train/soft_target_kl"] < 1e-2


def test_an_export_has_the_adapters_and_a_finished_run_says_so_again(run, one_rank, scene):
    one_rank.megakd("export", scene / "run.yaml", "--to", scene / "exported", code=0)
    shutil.rmtree(run / "final")

    again = finish(one_rank, scene / "run.yaml")

    assert (scene / "exported" / ADAPTER / "adapter_config.json").is_file()
    assert "parameters trained, as adapters (LoRA)" in again.out
    assert (run / "final" / ADAPTER / "adapter_model.safetensors").is_file()
    other = one_rank.train("--config", scene / "run.yaml", "student.lora.r=2", code=2)
    assert "student.lora.r: 4 there, 2 here" in other.err


PRESETS = [pytest.param(f"zero{n}", marks=pytest.mark.slow) for n in ("0", "1", "3_offload")]


@pytest.mark.parametrize("preset", ["zero2", "zero3", *PRESETS])
def test_adapters_train_in_bf16_with_checkpointed_blocks_and_resume(
    one_rank, scene, tmp_path, preset
):
    student = {"deepspeed": preset, "lora": {**LORA, "dropout": 0.1}}
    train = {"bf16": True, "gradient_checkpointing": True}
    config, again = run_of(scene, tmp_path, student=student, train=train), f"{tmp_path}/again"
    stopped = one_rank.train("--config", config, f"output_dir={again}", stop_at=("student", 2))
    assert stopped.code != 0

    finish(one_rank, config)
    finish(one_rank, config, f"output_dir={again}")

    actual, expected = (
        load_file(tmp_path / name / "final" / ADAPTER / "adapter_model.safetensors")
        for name in ("again", "out")
    )
    assert {tensor.dtype for tensor in expected.values()} == {torch.bfloat16}
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert any(tensor.any() for name, tensor in expected.items() if "lora_B" in name)


def test_a_pool_teaches_a_classifier_with_adapters_and_a_head(one_rank, whole_run, tmp_path):
    base = {"model": str(whole_run.teacher)}

    finish_in(
        one_rank,
        tmp_path,
        whole_run.task,
        teachers=[{"name": name, **base} for name in ("one", "two")],
        student={**base, "lora": LORA},
        method={"name": "mean_of_teachers"},
    )

    before, after = (
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        for folder in (whole_run.teacher, tmp_path / "out" / "final")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"classifier.weight", "bert.pooler.dense.weight"} < changed
    assert "bert.encoder.layer.0.attention.self.query.weight" in changed
    assert not any("embeddings" in name or "LayerNorm" in name for name in changed)
    assert not any(name.startswith("bert.encoder") and name.endswith("bias") for name in changed)


def test_the_base_teaches_without_a_second_model_and_is_scored_as_the_teacher(
    one_rank, scene, run, tmp_path
):
    outcome = finish(one_rank, run_of(scene, tmp_path, teacher={"model": "student_base"}))

    base, second = read(tmp_path / "out"), read(run)
    # The student's stage, then the scores of teacher and student, one after the other.
    assert len(outcome.loaded) == 3
    assert metrics_of(base, "teacher") == metrics_of(second, "teacher")
    assert base["student.loss"] == pytest.approx(second["student.loss"], rel=1e-5)
    assert "by distilling `base`" in (tmp_path / "out" / "final" / "README.md").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.lora.r=0", "student.lora.r: "),
        ("student.lora.target_modules=[]", "student.lora.target_modules: "),
        (
            "student.lora.target_modules=[q_porj]",
            'student.lora.target_modules: the student has no module "q_porj"',
        ),
        (
            "teacher={model: student_base, finetune: {max_steps: 1}}",
            "teacher.finetune: not supported with teacher.model",
        ),
    ],
)
def test_settings_that_adapters_cannot_have_are_refused_before_the_base_is_loaded(
    one_rank, scene, tmp_path, override, message
):
    outcome = one_rank.train("--config", run_of(scene, tmp_path), override, code=2)

    assert message in outcome.err
    assert outcome.loaded == ()


def test_without_peft_the_extra_to_install_is_named(scene, tmp_path, monkeypatch):
    monkeypatch.setattr("megakd.config.checks.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'megakd\[lora\]'"):
        load_config(run_of(scene, tmp_path))
