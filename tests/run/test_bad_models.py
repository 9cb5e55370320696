"""Models that cannot be used get one message from the whole command; nothing is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from spoiling import LATE, assert_refused
from tiny_runs import write_text
from whole_run import finish_in

WEIGHTS = "model.safetensors"


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50])


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def remove_head(folder: Path) -> None:
    kept = {k: v for k, v in load_file(folder / WEIGHTS).items() if "classifier" not in k}
    save_file(kept, folder / WEIGHTS)


def rename_labels(folder: Path) -> None:
    change_config(folder, id2label={"0": "cat", "1": "dog"}, label2id={"cat": 0, "dog": 1})


def into_other_family(folder: Path) -> None:
    change_config(folder, model_type="bart")


def without_heads(folder: Path) -> None:
    change_config(folder, num_attention_heads=0)


def change_config(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


TEACHERS: dict[str, tuple[tuple[Callable[[Path], None], ...], tuple[str, ...]]] = {
    "cut short": ((cut_short,), (WEIGHTS, "bytes) is cut short or damaged")),
    "tokenizer": ((break_tokenizer,), ("the tokenizer files in", "cannot be read")),
    "no head": ((remove_head,), ("teacher.model", "has no head for classification")),
    "labels": ((rename_labels,), ("labels (cat, dog)", "of the data (negative, positive)")),
    "family": ((into_other_family,), ("model_type 'bart' is not supported", "bert, roberta")),
    "size": ((without_heads,), ("config.json", "num_attention_heads must be a whole number")),
    # Several faults at once: weight files, then the tokenizer, then head and labels.
    "all": ((remove_head, break_tokenizer, cut_short), ("is cut short or damaged",)),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_a_teacher_folder_that_cannot_be_used(bench, case):
    faults, fragments = TEACHERS[case]
    folder = bench.copied()
    for fault in faults:
        fault(folder)

    outcome = bench.start(bench.tree(teacher={"model": str(folder)}))

    assert_refused(outcome, bench, folder if case not in ("labels", "family") else "", *fragments)


def test_a_student_that_is_cut_short_is_found_before_a_teacher_is_trained(bench):
    folder = bench.copied()
    cut_short(folder)
    outcome = bench.start(bench.tree(teacher=LATE, student={"model": str(folder)}))
    assert_refused(outcome, bench, f"student.model: {folder / WEIGHTS} (", "is cut short")


@pytest.fixture(scope="module")
def other_tokenizer(one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    task = {"type": "causal_lm", "dataset": str(write_text(folder / "text.txt"))}
    finish_in(one_rank, folder, task, train={"max_steps": 1})
    return folder / "out" / "final"


def without_a_token(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checksums.json"))
    tree = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary.pop(max(vocabulary, key=vocabulary.get))
    tree["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(tree))
    return copy


def test_a_model_with_another_tokenizer_is_not_scored(bench, other_tokenizer):
    other = without_a_token(other_tokenizer, bench.folder / "other")
    config = other_tokenizer.parents[1] / "run.yaml"
    override = f"student.model={other_tokenizer}"
    outcome = bench.one_rank.megakd("evaluate", config, override, "--model", other)
    assert_refused(outcome, bench, f"{other} has a tokenizer of")
