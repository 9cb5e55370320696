"""The config that a run of masked language modelling leaves for the tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import bert, write_reviews, write_text
from transformers import AutoModelForSequenceClassification
from whole_run import finish, finish_in


@pytest.fixture(scope="module")
def pretrained(one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    task = {"type": "mlm", "dataset": str(write_text(folder / "text.txt"))}
    method = {"name": "homodistil", "target_width": 10, "pruning_end": 3, "cuts": 1}
    models = {"teacher": {"model": bert(1, num_attention_heads=4)}}
    models["student"] = {"model": "from_teacher"}
    finish_in(one_rank, folder, task, method=method, **models)
    return folder


def test_the_pruned_student_is_fine_tuned_on_a_users_task_with_it(one_rank, pretrained, tmp_path):
    changes = ["train.max_steps=3", "train.per_device_train_batch_size=4"]
    changes += [f"task.dataset={write_reviews(tmp_path / 'reviews')}"]
    finish(one_rank, pretrained / "out" / "finetune.yaml", f"output_dir={tmp_path}/out", *changes)

    # 4 heads of 3 columns (10/16 of 4, rounded) are no stock shape of a model of width 10.
    final = tmp_path / "out" / "final"
    assert json.loads((final / "config.json").read_text())["model_type"] == "cut_bert"
    AutoModelForSequenceClassification.from_pretrained(final, trust_remote_code=True)


def test_a_users_changes_to_the_config_are_kept(one_rank, pretrained):
    path = pretrained / "out" / "finetune.yaml"
    path.write_text(path.read_text() + "# mine\n")
    (pretrained / "out" / "report.json").unlink()

    finish(one_rank, pretrained / "run.yaml")

    assert path.read_text().endswith("# mine\n")


def test_other_tasks_leave_no_such_config(whole_run):
    assert not list(Path(whole_run.out).glob("finetune.yaml"))
