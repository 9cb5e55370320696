"""Whole runs on rows of several texts, and of models that need one text in a row."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from tiny_runs import config_tree, llama, text_task
from transformers import AutoModelForCausalLM
from whole_run import finish, finish_in, forgotten, read, records

from megakd.config.file import config_of
from megakd.errors import ConfigError
from megakd.training.inputs import prepare


def lfm2(layers: int, width: int = 16):
    """Convolutions between attentions."""
    kinds = (["conv", "full_attention"] * layers)[:layers]
    sizes = {"layer_types": kinds, "block_multiple_of": 8, "block_auto_adjust_ff_dim": False}
    return llama(layers, width, model_type="lfm2", **sizes)


def prepared(tmp_path, student, **sections):
    task = text_task(tmp_path, max_length=16)
    tree = config_tree(tmp_path / "out", task, student={"model": student}, **sections)
    return prepare(config_of(tree))


def test_texts_share_rows_only_if_all_models_keep_them_apart(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    exact = prepared(tmp_path, llama(1))
    assert exact.config.train.packing is True
    assert any(0 in row["position_ids"][1:] for row in exact.encoded.train)
    assert "train.packing" not in caplog.text

    mixing = prepared(tmp_path, lfm2(2))

    assert mixing.config.train.packing is False
    assert not any(0 in row["position_ids"][1:] for row in mixing.encoded.train)
    assert caplog.text.count("train.packing: false (auto): every row has one text") == 1
    assert "because student.model (lfm2) would not compute" in caplog.text
    asked = prepared(tmp_path, llama(1), train={"packing": False})
    assert asked.encoded.train.cache_files != exact.encoded.train.cache_files


@pytest.mark.parametrize("train", [{"packing": True}, {"tokens_per_rank": 64}])
def test_packing_is_refused_where_a_model_mixes_the_texts_of_a_row(tmp_path, train):
    (key,) = train
    text = rf"train\.{key}.* packs several texts into a row, and student\.model \(lfm2\)"
    with pytest.raises(ConfigError, match=text):
        prepared(tmp_path, lfm2(2), train=train)


HALVES = [{"loss": name, "weight": 0.5} for name in ("soft_target_kl", "hard_cross_entropy")]


def assert_goes_on(one_rank, folder, *changes: str, **sections) -> None:
    """A run that is killed after step 4 learns the same with changed micro-batches."""
    sections |= {"method": {"name": "single"}, "save": {"save_steps": 4}}
    finish_in(one_rank, folder, text_task(folder), **sections)
    out = forgotten(folder / "out", folder / "killed", stage="student", after=4)

    outcome = finish(one_rank, folder / "run.yaml", f"output_dir={out}", *changes)

    assert "student: resumed at step 4" in outcome.err
    losses, expected = (
        [r["train/loss"] for r in records(one, "student") if "train/loss" in r]
        for one in (out, folder / "out")
    )
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_recurrent_student_learns_and_is_scored_on_single_texts_and_a_run_goes_on(
    one_rank, tmp_path
):
    """Perplexity is that of each text alone."""
    rows = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_goes_on(
        one_rank,
        tmp_path,
        *("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2"),
        teacher={"model": lfm2(2), "finetune": {"max_steps": 2}},
        student={"model": lfm2(2)},
        objective=HALVES,
        eval={"eval_steps": 4, "keep_best": False},
        train={**rows, "max_steps": 6},
    )

    expected = perplexity(tmp_path)
    assert read(tmp_path / "out")["student.perplexity"] == pytest.approx(expected, rel=1e-4)


def test_a_run_that_was_killed_may_go_on_with_another_budget(one_rank, tmp_path):
    """Steps of 8 rows of 16 tokens; the last step of every epoch has fewer rows."""
    train = {"per_device_train_batch_size": 8, "max_steps": 12, "gradient_checkpointing": True}
    assert_goes_on(
        one_rank,
        tmp_path,
        "train.tokens_per_rank=32",
        teacher={"model": llama(2, width=24), "finetune": {"max_steps": 20}},
        student={"model": llama(1), "deepspeed": "zero3"},
        objective=[*HALVES, {"loss": "hidden_mse", "weight": 0.1, "layer_mapping": ["1:2"]}],
        eval={"eval_steps": 4},
        train={**train, "tokens_per_rank": 56},
    )


def perplexity(folder) -> float:
    """Of the student on the held-out rows, one by one and without padding."""
    config = config_of(json.loads((folder / "run.yaml").read_text()))
    rows = prepare(dataclasses.replace(config, output_dir=folder / "other")).encoded.held_out
    model = AutoModelForCausalLM.from_pretrained(folder / "out/final").eval()
    nats = count = 0.0
    for row in rows:
        ids, labels = (torch.tensor(row[name]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += (labels != -100).sum().item()
    return float(torch.tensor(nats / count).exp())
