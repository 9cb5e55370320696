"""HomoDistil through the real commands: results, stops, and settings that cannot work."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import NO_DROPOUT, bert, llama, run_in, write_text
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from whole_run import finish, read, records, same_weights, unexplained, weights

METHOD = {"name": "homodistil", "target_width": 12, "cuts": 2, "pruning_end": 6}
TRAIN = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.01}
EVERY_STEP = {"eval_steps": 1, "keep_best": False}


def pruning(folder: Path, kind: str = "mlm", **sections: Any) -> Path:
    """A run config of a teacher with random weights, so that no time goes into its training."""
    folder.mkdir(parents=True, exist_ok=True)
    text = write_text(folder / "text.txt", documents=80)
    model = (
        bert(2, 24, num_attention_heads=3, hidden_act="relu")
        if kind == "mlm"
        else llama(2, 32, num_attention_heads=4, num_key_value_heads=2)
    )
    method = METHOD if kind == "mlm" else {**METHOD, "target_width": 16, "round_to": 8}
    return run_in(
        folder,
        {"type": kind, "dataset": str(text)},
        teacher=sections.pop("teacher", {"model": model}),
        method={**method, **sections.pop("method", {})},
        train={**TRAIN, **sections.pop("train", {})},
        student={"model": "from_teacher"},
        **sections,
    )


@pytest.fixture(scope="module")
def pruned(one_rank, tmp_path_factory) -> Path:
    """The folder of a run, whose windows and report load the teacher once."""
    folder = tmp_path_factory.mktemp("homodistil")
    outcome = finish(one_rank, pruning(folder, eval=EVERY_STEP))
    loaded = [Path(name).name for name in outcome.loaded]
    # `new bert` is the teacher, then the student, which starts as the teacher.
    assert loaded == ["new bert", "new bert", "pruning-1", "pruning-2", "student"]
    return folder / "out"


def test_the_student_is_a_stock_model_with_the_target_width_in_every_matrix(pruned):
    model = AutoModelForMaskedLM.from_pretrained(pruned / "final")

    # 3 heads of 4 columns are 12: the stock class can say the shape.
    sizes = model.config.model_type, model.config.hidden_size, model.config.intermediate_size
    assert sizes == ("bert", 12, 24)
    assert model.bert.encoder.layer[0].attention.self.query.weight.shape == (12, 12)


def test_sizes_fall_at_the_cuts_and_the_report_lists_them(pruned):
    rows = read(pruned)["pruning"]
    first, last = rows[0], rows[-1]

    assert (first["width"], first["teacher_kl"], last["width"]) == (24, 0.0, 12)  # the teacher
    assert [row["step"] for row in rows] == [*range(9)]
    assert [row["width"] for row in rows] == sorted((row["width"] for row in rows), reverse=True)
    stages = ["pruning-1", "pruning-2", "student"]
    sizes = [sum(w.numel() for w in weights(pruned / "stages" / s).values()) for s in stages]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == last["parameters"]
    assert sizes[0] in {row["parameters"] for row in rows}


def test_windows_continue_one_schedule_and_one_count_of_steps(pruned):
    stages = ("pruning-1", "pruning-2", "student")
    logged = [r for s in stages for r in records(pruned, s) if "train/learning_rate" in r]
    rates = {record["step"]: record["train/learning_rate"] for record in logged}

    # One linear decay over all eight steps, whatever ends in between.
    assert rates == pytest.approx({step: 0.01 * (9 - step) / 8 for step in rates})
    assert (len(rates), max(rates)) == (len(logged), 8)


def test_a_model_in_flight_loads_with_plain_transformers_and_is_exported_without_its_state(
    one_rank, pruned, tmp_path
):
    stage, model = pruned / "stages" / "pruning-1", tmp_path / "model"
    export = ("export", pruned.parent / "run.yaml", "--stage", "pruning-1", "--to", model)
    one_rank.megakd(*export, code=0)

    config = json.loads((stage / "config.json").read_text())
    assert (config["model_type"], config["narrow"]["score_width"]) == ("narrow_bert", 8)
    assert (stage / "training_state").is_dir()
    assert not (model / "training_state").exists()
    for folder in (stage, model):
        AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)


def assert_same(out: Path, whole: Path) -> None:
    assert same_weights(out / "final", whole / "final")
    divergences, expected = (
        [r["teacher_kl"] for r in read(run)["pruning"]] for run in (out, whole)
    )
    assert divergences == expected


def test_a_run_stopped_in_every_window_ends_with_the_same_weights(one_rank, pruned, tmp_path):
    config = pruning(tmp_path, eval=EVERY_STEP, save={"save_steps": 1})

    for stop in (("pruning-1", 1), ("pruning-2", 3), ("student", 7)):
        assert one_rank.train("--config", config, stop_at=stop).code != 0
    finish(one_rank, config)

    assert_same(tmp_path / "out", pruned)


def test_a_run_stopped_between_windows_goes_on_unless_its_training_state_is_damaged(
    one_rank, pruned, tmp_path
):
    out, config = Path(shutil.copytree(pruned, tmp_path / "out")), pruned.parent / "run.yaml"
    (out / "report.json").unlink()
    for later in ("stages/pruning-2", "stages/student", "final", "checkpoints"):
        shutil.rmtree(out / later, ignore_errors=True)
    state = out / "stages" / "pruning-1" / "training_state" / "model.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-7])

    outcome = one_rank.train("--config", config, f"output_dir={out}", code=2)

    assert "training_state/model.safetensors" in outcome.err
    assert "remove" in outcome.err
    state.write_bytes(whole)
    finish(one_rank, config, f"output_dir={out}")
    assert_same(out, pruned)


def test_a_decoder_is_pruned_to_a_stock_model(one_rank, tmp_path):
    finish(one_rank, pruning(tmp_path, "causal_lm"))

    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final").config
    assert (config.model_type, config.hidden_size, config.intermediate_size) == ("llama", 16, 32)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)


SIZES = {"num_hidden_layers": 2, "max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("kind", "keys", "method", "rows"),
    [
        # Queries, keys and values of 2 heads of 16 columns, which are wider than 24 together.
        ("causal_lm", {"model_type": "gpt_neox", "num_attention_heads": 2}, 24, 96),
        # Heads stay, whose positions all layers share; transformers shows no attention of it.
        ("mlm", {"model_type": "mpnet", "num_attention_heads": 4}, 16, 32),
        ("causal_lm", {"model_type": "olmo2", "num_attention_heads": 4}, 24, 32),
    ],
)
def test_families_that_are_cut_as_a_small_copy_shows_open_narrower(
    one_rank, tmp_path, kind, keys, method, rows
):
    model = {"config": {**SIZES, **keys, "hidden_size": 32, "intermediate_size": 64}}
    options = {"target_width": method, "round_to": 8, "cuts": 1}

    finish(one_rank, pruning(tmp_path, kind, teacher={"model": model}, method=options))

    auto = AutoModelForCausalLM if kind == "causal_lm" else AutoModelForMaskedLM
    brings_code = keys["model_type"] != "olmo2"
    opened = auto.from_pretrained(tmp_path / "out" / "final", trust_remote_code=brings_code)
    assert opened.config.hidden_size == method
    assert opened.get_input_embeddings().weight.shape[1] == method
    assert rows in {weight.shape[0] for weight in opened.parameters()}
    assert read(tmp_path / "out")["pruning"][-1]["parameters"] == sum(
        weight.numel() for weight in opened.parameters()
    )


def test_a_narrow_masked_model_can_become_a_classifier(one_rank, tmp_path):
    model = {"config": {**SIZES, "model_type": "bert", "num_attention_heads": 4}}
    model["config"] |= {"hidden_size": 32, "intermediate_size": 64}
    options = {"target_width": 15, "round_to": 1, "cuts": 1}

    finish(one_rank, pruning(tmp_path, "mlm", teacher={"model": model}, method=options))

    opened = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out" / "final", trust_remote_code=True, num_labels=2
    )
    assert opened(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 2)
    assert opened.classifier.weight.shape == (2, 15)


def test_best_evaluations_and_early_stopping_count_only_after_the_end_of_pruning(
    one_rank, tmp_path
):
    config = pruning(
        tmp_path,
        method={"cuts": 1},
        train={"early_stopping_patience": 1},
        eval={"eval_steps": 1, "keep_best": True},
        baselines=["alone", "random"],
    )

    finish(one_rank, config)

    out = tmp_path / "out"
    (best,) = (out / "checkpoints/student/best").iterdir()
    assert int(best.name.removeprefix("step-")) >= METHOD["pruning_end"]
    assert not (out / "checkpoints/pruning-1/best").exists()
    assert json.loads((out / "final" / "config.json").read_text())["hidden_size"] == 12
    assert {*read(out)["baselines"]} == {"alone", "random"}
    assert unexplained(out) == []
    student, random = (
        {name: weight.shape for name, weight in weights(out / "stages" / stage).items()}
        for stage in ("student", "random")
    )
    assert student == random


def test_a_one_shot_run_jumps_further_from_its_teacher(one_rank, tmp_path):
    """The homotopy: small steps keep the divergence small. One of 24 columns is a large step."""
    teacher = bert(2, 24, num_attention_heads=3, initializer_range=0.5, **NO_DROPOUT)
    jumps = {}
    for name, method in {
        "one_shot": {"pruning_end": 10, "every": 10},
        "cubic": {"pruning_end": 40},
    }.items():
        config = pruning(
            tmp_path / name,
            method={**method, "cuts": 0},
            train={"max_steps": 50, "learning_rate": 0.003},
            eval={"eval_steps": 1},
            teacher={"model": teacher},
        )
        finish(one_rank, config)
        course = [row["teacher_kl"] for row in read(tmp_path / name / "out")["pruning"]]
        jumps[name] = max(b - a for a, b in pairwise(course))

    assert jumps["cubic"] <= 0.75 * jumps["one_shot"]


ALBERT = "{config: {model_type: albert, num_hidden_layers: 2, max_position_embeddings: 32}}"


@pytest.mark.parametrize(
    ("message", "overrides"),
    [
        ("24 is not possible for a teacher of width 24; use", "method.target_width=24"),
        ("loses heads (from 2 to 1 key-value groups", "objective=[{loss: attention_mse}]"),
        ("cannot lose columns: all its layers share", f"teacher.model={ALBERT}"),
        ("num_train_epochs 0.1 over", "train.max_steps=null; train.num_train_epochs=0.1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(
    one_rank, tmp_path, message, overrides
):
    config = pruning(tmp_path, "causal_lm" if "key-value" in message else "mlm")

    outcome = one_rank.train("--config", config, *overrides.split("; "), code=2)

    assert message in outcome.err, outcome.err
    assert not (tmp_path / "out" / "checkpoints").exists()
