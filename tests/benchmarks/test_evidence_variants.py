"""The plug-ins of the evidence: variants of MiniDisc, and labels alone in a cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import bert, config_tree, write_config, write_reviews
from whole_run import finish

from lib.launching import records_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sorted_teacher(one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    task = {"type": "classification", "dataset": str(write_reviews(folder / "reviews"))}
    model = bert(2, width=32, num_attention_heads=4)
    tree = config_tree(folder / "teacher", task, student={"model": model})
    tree["train"] |= {"per_device_train_batch_size": 8, "max_steps": 20}
    finish(one_rank, write_config(folder / "teacher.yaml", tree))
    return folder


def variant(one_rank, folder: Path, run: str, labelled: int | None = None, **options) -> Path:
    """Run a variant of MiniDisc with two trials of 4 steps."""
    task = {"type": "classification", "dataset": str(folder / "reviews")}
    task |= {"labelled_examples": labelled} if labelled else {}
    grid = {"sparsities": [0.25, 0.5, 0.75], "target_sparsity": 0.75, "round_to": 1}
    tree = config_tree(
        folder / run,
        task,
        teacher={"model": str(folder / "teacher/final")},
        student={"model": "from_teacher"},
        method={"name": "evidence_variants:Variant", **grid, **options},
        eval={"eval_steps": 4},
        log={"logging_steps": 1},
    )
    tree["train"] |= {"per_device_train_batch_size": 8, "max_steps": 4}
    finish(one_rank, write_config(folder / f"{run}.yaml", tree))
    return folder / run


def rates(out: Path, stage: str) -> list[float]:
    key = "train/learning_rate"
    return [r[key] for r in records_of(out) if r["stage"] == stage and key in r]


def test_a_variant_without_changes_is_the_paper(one_rank, sorted_teacher):
    ours = variant(one_rank, sorted_teacher, "ours")
    papers = variant(one_rank, sorted_teacher, "papers", name="minidisc", target_may_win=False)
    texts = [(out / "stages/trial-2/result.json").read_text() for out in (ours, papers)]
    scores = [json.loads(text)["metrics"] for text in texts]
    assert scores[0] == scores[1]


def test_one_schedule_goes_on_with_the_learning_rate_of_the_first_trial(one_rank, sorted_teacher):
    out = variant(one_rank, sorted_teacher, "one", one_schedule=True, teaches="split", alone=True)
    first, second = rates(out, "trial-1"), rates(out, "trial-2")
    assert max(second) < min(first)


def test_labels_alone_learn_from_the_rows_with_a_label_in_a_cut_of_the_target(
    one_rank, sorted_teacher
):
    out = variant(one_rank, sorted_teacher, "labels", labelled=8, name="evidence_labels:Labels")

    report = json.loads((out / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["specification", "student"]
    # Each of the 4 steps takes all 8 rows that have a label.
    assert max(record["epoch"] for record in records_of(out) if "epoch" in record) == 4.0
    config = json.loads((out / "final/config.json").read_text())
    assert config["model_type"] == "cut_bert"
