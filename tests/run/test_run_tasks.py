"""Whole runs by task: labels by name, scores of pairs, language models, and what ends badly."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import bert, llama, pairs_task, run_in, text_task
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from whole_run import finish_in, metrics_of, read, records, relabelled, same_weights

from megakd.config.file import load_config
from megakd.data.splits import load_splits


def test_labels_are_matched_by_name_when_the_teacher_has_them_in_another_order(
    one_rank, whole_run, tmp_path
):
    named = ("POSITIVE", "NEGATIVE")
    swapped = {"model": str(relabelled(whole_run.teacher, tmp_path / "swapped", (1, 0), named))}
    models = {"teacher": swapped, "student": swapped, "method": {"name": "single"}}

    finish_in(one_rank, tmp_path, whole_run.task, **models, train={"learning_rate": 0.0})

    alone = read(whole_run.folder / "teacher")["student.accuracy"]
    assert alone > 0.7
    assert read(tmp_path / "out")["teacher.accuracy"] == alone
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "final")
    assert exported.config.id2label == {0: "negative", 1: "positive"}


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_student_that_gets_worse_is_exported_at_its_best_unless_told_otherwise(
    one_rank, whole_run, tmp_path, keep_best
):
    finish_in(
        one_rank,
        tmp_path,
        whole_run.task,
        student={"model": str(whole_run.teacher)},
        # Warm-up begins at a rate of 0 and ends at one that wrecks any model.
        train={"learning_rate": 30.0, "warmup_ratio": 1.0, "max_steps": 5},
        eval={"eval_steps": 1, "keep_best": keep_best},
    )

    logged = [r.get("eval/accuracy") for r in records(tmp_path / "out", "student")]
    first, *_, last = [score for score in logged if score is not None]
    assert last < first
    same = same_weights(whole_run.teacher, tmp_path / "out" / "final")
    score = read(tmp_path / "out")["student.accuracy"]
    assert (same, score) == ((True, first) if keep_best else (False, last))


def test_scores_of_pairs_are_learned_and_correlated(one_rank, tmp_path):
    outcome = finish_in(
        one_rank,
        tmp_path,
        pairs_task(tmp_path, max_length=32),
        teacher={"model": bert(2), "finetune": {"max_steps": 6}, "deepspeed": "teacher_zero0"},
        student={"deepspeed": "zero3"},
        method={"name": "single"},
        baselines=["alone"],
    )

    report, final = read(tmp_path / "out"), tmp_path / "out" / "final"
    assert report["metric_name"] == "mean_pearson_spearman"
    assert "by distilling a random teacher" in (final / "README.md").read_text()
    assert {"pearson", "spearman"} <= {*report["metrics"]}
    assert metrics_of(report).keys() == metrics_of(report, "alone").keys()
    logged = next(r for r in records(tmp_path / "out", "student") if "train/loss" in r)
    assert {"train/hard_mse", "train/soft_target_mse"} <= logged.keys()
    model = AutoModelForSequenceClassification.from_pretrained(final)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert "pearson" in outcome.out
    expected = pearson_by_hand(model, final, tmp_path / "run.yaml")
    assert report["student.pearson"] == pytest.approx(expected, abs=1e-4)


def pearson_by_hand(model, final: Path, config: Path) -> float:
    """From a tokenizer that is given two texts."""
    task = load_config(config).task
    rows = load_splits(task, seed=0, cache_dir=final.parent / "cache").validation
    texts = list(rows["text"]), list(rows["text_pair"])
    batch = AutoTokenizer.from_pretrained(final)(*texts, padding=True, return_tensors="pt")
    assert set(batch["token_type_ids"].flatten().tolist()) == {0, 1}
    with torch.no_grad():
        scores = model(**batch).logits[:, 0].double()
    return float(torch.corrcoef(torch.stack([scores, torch.tensor(rows["label"])]))[0, 1])


@pytest.fixture(scope="module")
def language_run(one_rank, tmp_path_factory) -> Path:
    """A Llama with a tied head from an untied teacher, both from scratch, on a text file."""
    folder = tmp_path_factory.mktemp("language")
    finish_in(
        one_rank,
        folder,
        text_task(folder),
        teacher={"model": llama(2, width=24), "finetune": {"max_steps": 12}},
        student={"model": llama(1, tie_word_embeddings=True), "deepspeed": "zero3"},
        method={"name": "single"},
        objective=[
            {"loss": "soft_target_jsd", "weight": 0.5, "beta": 0.3},
            {"loss": "hard_cross_entropy", "weight": 0.5},
        ],
        eval={"eval_steps": 4},
        train={"max_steps": 8},
    )
    return folder


def pieces(ids: list[int], offset: int, length: int) -> Iterator[list[int]]:
    """A document as the rows of a packed text cut it, each piece with the token after it."""
    start = 0
    while start < len(ids) - 1:
        stop = min(len(ids), start + length - (offset + start) % length)
        if len(ids[start : stop + 1]) > 1:
            yield ids[start : stop + 1]
        start = stop


def test_a_tied_language_model_is_loaded_and_scored_with_plain_transformers(language_run):
    final = language_run / "out" / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    task = load_config(language_run / "run.yaml").task
    rows = load_splits(task, seed=42, cache_dir=language_run / "cache").validation

    loss, targets, offset = 0.0, 0, 0
    for text in rows["text"]:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        for piece in pieces(ids, offset, task.row_length):
            with torch.no_grad():
                logits = model(torch.tensor([piece[:-1]])).logits[0].double()
            following = torch.tensor(piece[1:])
            loss += float(torch.nn.functional.cross_entropy(logits, following, reduction="sum"))
            targets += len(following)
        offset += len(ids)

    assert "lm_head.weight" not in load_file(final / "model.safetensors")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    report = read(language_run / "out")
    reported = metrics_of(report)
    assert loss / targets == pytest.approx(reported["loss"], rel=1e-5)
    assert reported["perplexity"] == pytest.approx(math.exp(reported["loss"]))
    assert 1 < report["teacher.perplexity"] < reported["perplexity"] < 320
    logged = [r for r in records(language_run / "out", "student") if "train/loss" in r]
    assert logged[-1]["train/hard_cross_entropy"] < logged[0]["train/hard_cross_entropy"]


def test_a_loss_that_was_not_finite_long_before_the_log_line_stops_the_run(
    one_rank, whole_run, tmp_path
):
    config = run_in(
        tmp_path,
        whole_run.task,
        student={"model": str(whole_run.teacher)},
        train={"max_steps": 8, "learning_rate": 1e30},
        log={"logging_steps": 8},
    )

    outcome = one_rank.train("--config", config, code=2)

    told = r"student: the loss or its gradient is not finite \(NaN or infinite\) at step [23];"
    assert re.search(told, outcome.err), outcome.err
    assert "the last good checkpoint is" in outcome.err
    assert not (tmp_path / "out" / "report.json").exists()
