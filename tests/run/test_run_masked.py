"""A whole run of masked language modelling: learned, scored, exported, resumed, refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spoiling import assert_refused
from tiny_runs import bert, text_task, write_reviews
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer
from whole_run import finish, finish_in, metrics_of, read, records

from megakd.config.file import load_config
from megakd.data.batch import IGNORE
from megakd.data.collation import Collator, task_masking
from megakd.data.encoding import encode_splits
from megakd.data.loader import evaluation_batches
from megakd.data.splits import load_splits


@pytest.fixture(scope="module")
def masked_run(one_rank, tmp_path_factory) -> Path:
    """A teacher and a sharded student from scratch, on a text whose documents are cut."""
    folder = tmp_path_factory.mktemp("masked")
    finish_in(
        one_rank,
        folder,
        text_task(folder, "mlm", mlm_probability=0.3),
        teacher={"model": bert(2, width=24), "finetune": {"max_steps": 40}},
        student={"deepspeed": "zero3"},
        method={"name": "single"},
        objective=[
            {"loss": "soft_target_jsd", "weight": 0.5, "beta": 0.3},
            {"loss": "hard_cross_entropy", "weight": 0.5},
            {"loss": "hidden_mse", "weight": 0.1, "layer_mapping": ["1:2"]},
        ],
        eval={"eval_steps": 4, "latency": True},
        train={"max_steps": 12, "gradient_accumulation_steps": 2},
    )
    return folder


def test_the_final_model_scores_the_same_with_plain_transformers(masked_run, tmp_path):
    final, task = masked_run / "out" / "final", load_config(masked_run / "run.yaml").task
    model = AutoModelForMaskedLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    splits = load_splits(task, seed=42, cache_dir=tmp_path)
    rows = encode_splits(splits, tokenizer, task, cache_dir=tmp_path).validation
    one_rank = {"rank": 0, "world": 1, "masking": task_masking(tokenizer, task)}

    nats, right, targets = 0.0, 0, 0
    for batch in evaluation_batches(rows, Collator(tokenizer, task), batch_size=3, **one_rank):
        hidden = batch.labels != IGNORE
        with torch.no_grad():
            logits = model(**batch.inputs).logits[hidden].double()
        truth = batch.labels[hidden]
        nats += float(torch.nn.functional.cross_entropy(logits, truth, reduction="sum"))
        right += int((logits.argmax(-1) == truth).sum())
        targets += len(truth)

    report = read(masked_run / "out")
    reported = metrics_of(report)
    assert nats / targets == pytest.approx(reported["loss"], rel=1e-5)
    assert right / targets == pytest.approx(reported["accuracy"])
    assert reported["perplexity"] == pytest.approx(math.exp(reported["loss"]))
    assert 1 < report["teacher.perplexity"] < reported["perplexity"] < 69
    logged = [r for r in records(masked_run / "out", "student") if "train/loss" in r]
    assert logged[-1]["train/hard_cross_entropy"] < logged[0]["train/hard_cross_entropy"]
    assert 0 <= logged[-1]["train/top1_agreement"] <= 1


def test_the_final_folder_says_what_it_is_and_keeps_its_tie(masked_run):
    final = masked_run / "out" / "final"
    model = AutoModelForMaskedLM.from_pretrained(final)
    card = (final / "README.md").read_text()

    assert json.loads((final / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    assert "cls.predictions.decoder.weight" not in load_file(final / "model.safetensors")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "pipeline_tag: fill-mask" in card
    assert "AutoModelForMaskedLM.from_pretrained(folder)" in card
    assert read(masked_run / "out")["student.speedup_batch_1"] > 0
    assert not (final / "generation_config.json").exists()


def test_it_is_evaluated_to_the_same_numbers_whatever_the_batch(one_rank, masked_run):
    outcome = one_rank.megakd(
        "evaluate", masked_run / "run.yaml", "eval.per_device_eval_batch_size=5", "--json", code=0
    )

    metrics = json.loads(outcome.out)["metrics"]
    assert metrics == pytest.approx(metrics_of(read(masked_run / "out")))


def test_a_tokenizer_without_a_mask_token_is_refused(bench):
    folder = bench.copied()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    outcome = bench.start(bench.tree({"type": "mlm"}, teacher={"model": str(folder)}))

    assert_refused(outcome, bench, f"the tokenizer in {folder} has no mask token, which mlm needs")


# The config that such a run leaves for the tasks.


@pytest.fixture(scope="module")
def pretrained(one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    method = {"name": "homodistil", "target_width": 10, "pruning_end": 3, "cuts": 1}
    models = {"teacher": {"model": bert(1, num_attention_heads=4)}}
    models["student"] = {"model": "from_teacher"}
    finish_in(one_rank, folder, text_task(folder, "mlm"), method=method, **models)
    return folder


def test_the_pruned_student_is_fine_tuned_on_a_users_task_with_it(one_rank, pretrained, tmp_path):
    changes = ["train.max_steps=3", "train.per_device_train_batch_size=4"]
    changes += [f"task.dataset={write_reviews(tmp_path / 'reviews')}"]
    finish(one_rank, pretrained / "out" / "finetune.yaml", f"output_dir={tmp_path}/out", *changes)

    # 4 heads of 3 columns (10/16 of 4, rounded) are no stock shape of a model of width 10.
    final = tmp_path / "out" / "final"
    assert json.loads((final / "config.json").read_text())["model_type"] == "narrow_bert"
    AutoModelForSequenceClassification.from_pretrained(final, trust_remote_code=True)


def test_a_users_changes_to_the_config_are_kept(one_rank, pretrained, whole_run):
    path = pretrained / "out" / "finetune.yaml"
    path.write_text(path.read_text() + "# mine\n")
    (pretrained / "out" / "report.json").unlink()

    finish(one_rank, pretrained / "run.yaml")

    assert path.read_text().endswith("# mine\n")
    assert not list(whole_run.out.glob("finetune.yaml"))  # other tasks leave no such config
