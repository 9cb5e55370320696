"""Losses of several labels a row, at any ranks and cuts, equal one plain process."""

from __future__ import annotations

import json
import random

import equal_runs
import pytest
import reference
import torch
from equal_runs import CUTS, SETTINGS, assert_same, cut_of, plain_run
from safetensors.torch import load_file
from tiny_runs import NO_DROPOUT, bert, run_in, write_jsonl
from torch.nn.functional import binary_cross_entropy_with_logits

TERMS = {"hard_cross_entropy": 0.3, "soft_target_kl": 0.7}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of none to three labels; the labels of some are unknown."""
    folder, rng = tmp_path_factory.mktemp("several"), random.Random(0)
    for split, count in {"train": 40, "validation": 13}.items():
        rows = list(equal_runs.rows(count, seed=count))
        for row in rows:
            chosen = [number for number in range(3) if rng.random() < 0.4]
            row["label"] = None if row["label"] is None else chosen
            row["p"] = [round(rng.random(), 2) for _ in range(3)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def terms_of_sets(student, teacher, projections, batch, settings):
    """What `reference.step_terms` is for one label: the mean over rows and classes."""
    logits = student(**batch.inputs).logits
    with torch.no_grad():
        taught = teacher(**batch.inputs).logits
    known, heat = ~batch.labels[:, 0].isnan(), settings["temperature"]
    q, p = (logits / heat).sigmoid(), (taught / heat).sigmoid()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return {
        "hard_cross_entropy": binary_cross_entropy_with_logits(logits[known], batch.labels[known]),
        "soft_target_kl": heat**2 * divergence.mean(),
    }


@pytest.mark.parametrize(("stages", "cut"), [((0, 0), CUTS[2]), ((3, 3), CUTS[3])])
def test_a_student_learns_several_labels_as_in_one_plain_process(
    distil, monkeypatch, data, stages, cut
):
    monkeypatch.setattr(reference, "step_terms", terms_of_sets)
    sections = {"task": {"dataset": str(data)}, "train": cut_of(cut)}

    path, result = distil("bert-student", TERMS, stages, ranks=cut[0], **sections)

    assert SETTINGS["temperature"] != 1.0
    assert_same(result[0], plain_run(path, TERMS, result[0]["initial"]))


def test_soft_labels_teach_two_ranks_as_one(command, data, tmp_path):
    task = {"type": "classification", "dataset": str(data), "soft_labels": "p"}
    task["tokenizer"] = {"type": "wordpiece", "vocab_size": 320}
    config = run_in(
        tmp_path,
        task,
        student={"model": bert(1, **NO_DROPOUT)},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl", "temperature": 2.0}],
        train={"adam_epsilon": 0.01},
    )
    final = []
    for world, rows, micro_batches in ((1, 12, 1), (2, 2, 3)):
        out = tmp_path / f"of-{world}"
        words = (f"train.per_device_train_batch_size={rows}", f"output_dir={out}")
        words += (f"train.gradient_accumulation_steps={micro_batches}",)
        command("--config", str(config), *words, world=world, code=0)
        final.append(load_file(out / "final" / "model.safetensors"))

    for name, weight in final[0].items():
        assert torch.allclose(final[1][name], weight, atol=1e-6), name


@pytest.fixture(scope="module")
def one_by_one(data, tmp_path_factory):
    """The config of a run whose labels have a threshold each, and its thresholds on one rank."""
    folder = tmp_path_factory.mktemp("thresholds")
    task = {"type": "classification", "dataset": str(data)}
    task["tokenizer"] = {"type": "wordpiece", "vocab_size": 320}
    return run_in(
        folder,
        task,
        student={"model": bert(1, **NO_DROPOUT)},
        train={
            "adam_epsilon": 0.01,
            "per_device_train_batch_size": 12,
            "learning_rate": 0.1,
            "max_steps": 20,
        },
        eval={"threshold": "each", "eval_steps": 5},
    )


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_choose_the_thresholds_of_one(command, one_by_one, tmp_path, stage):
    out, chosen = one_by_one.parent / "out", []
    command("--config", str(one_by_one), world=1, code=0)  # returns at once if it is finished
    words = (f"student.deepspeed=zero{stage}", "train.per_device_train_batch_size=6")
    command("--config", str(one_by_one), *words, f"output_dir={tmp_path}/out", world=2, code=0)
    for folder in (out, tmp_path / "out"):
        chosen.append(json.loads((folder / "final" / "config.json").read_text())["threshold"])
        assert json.loads((folder / "report.json").read_text())["student.threshold"] == chosen[-1]

    assert chosen[0] == chosen[1]
    assert len({*chosen[0]}) > 1
