"""A folder holds one run: what its results depend on is compared at every start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import bert, config_tree, review_task

from megakd.config.file import config_of
from megakd.data import files as data_files
from megakd.data import readers
from megakd.engine.distributed import Ranks
from megakd.errors import CheckpointError
from megakd.process import seals
from megakd.process.files import write_json
from megakd.process.record import differences
from megakd.run.finished_run import RUN, begin_run, check_identity, fingerprint_of, growable_keys
from megakd.training.checkpoint import FORMAT

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, CPU)


@pytest.fixture
def facts(tmp_path):
    """What a run depends on: `facts(ranks, key=value, …)`."""
    task = review_task(tmp_path, type="classification")
    model = tmp_path / "teacher"
    model.mkdir()
    for name in ("config.json", "README.md"):
        (model / name).write_text("{}")

    def of(*words: str, ranks: int = 1) -> dict[str, Any]:
        sections = {"teacher": {"model": str(model)}, "method": {"name": "single"}}
        config = config_of(config_tree(tmp_path / "out", task, **sections), list(words))
        return fingerprint_of(config, Ranks(0, ranks, 0, CPU))

    return of


ROWS = "train.per_device_train_batch_size"


FREE = (
    *("output_dir=elsewhere", "log.logging_steps=1", "save.save_steps=1", "save.onnx=true"),
    *("eval.per_device_eval_batch_size=3", "train.kernels=reference", "eval.eval_steps=2"),
    *("student.deepspeed=zero3", "eval.latency=false"),
    *("train.max_steps=99", "train.num_train_epochs=7"),  # its last stages may get longer
    *(f"{ROWS}=2", "train.gradient_accumulation_steps=2"),
)


def test_what_no_result_depends_on_is_no_part_of_a_run(facts):
    split = [f"{ROWS}=4", "train.gradient_accumulation_steps=1", "eval.keep_best=false"]
    assert differences(facts(*split), facts(*split, *FREE)) == ""


def test_ranks_that_share_the_rows_of_a_step_are_the_same_run_and_others_are_told(facts, tmp_path):
    two = facts(f"{ROWS}=3", ranks=2)
    assert differences(two, facts(f"{ROWS}=6")) == ""
    write(tmp_path, two)
    message = r"of all ranks: 6 there, 3 here.*ranks must divide 6\)"
    with pytest.raises(CheckpointError, match=message):
        check_identity(tmp_path, facts(f"{ROWS}=3"))


def test_what_a_result_depends_on_is_named_with_both_values(facts):
    changes = {
        "train.learning_rate=1.0": "train.learning_rate: 0.01 there, 1.0 here",
        "train.bf16=true": "on this device train: 'fp32' there, 'bf16' here",
        "eval.eval_steps=2": "eval.eval_steps: None there, 2 here",  # the best one is kept
        "baselines=[alone]": "baselines",
        "task.max_length=8": "task.max_length: 16 there, 8 here",
    }
    told = {change: differences(facts(), facts(change)) for change in changes}
    assert [change for change, field in changes.items() if field not in told[change]] == []


def test_a_file_of_the_data_or_of_a_model_that_changes_is_named_with_size_and_time(facts, tmp_path):
    before = facts()
    (tmp_path / "teacher" / "README.md").write_text("a card that was edited")
    assert differences(before, facts()) == ""

    os.utime(tmp_path / "teacher" / "config.json", (0, 0))
    rows = tmp_path / "reviews" / "train.jsonl"
    rows.write_text(rows.read_text() + "\n")

    told = differences(before, facts())
    assert "file teacher.model teacher/config.json: '2 bytes of " in told
    assert "'2 bytes of 1970-01-01 00:00:00 UTC' here" in told
    assert "file task.dataset reviews/train.jsonl" in told


@pytest.mark.parametrize("name", ["reviews/train.jsonl", "teacher/config.json"])
def test_another_content_of_the_same_size_and_time_is_another_run(
    facts, tmp_path, monkeypatch, name
):
    monkeypatch.setenv("MEGAKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(seals, "_SETTLED_NS", 0)
    before, path = facts(), tmp_path / name
    write(tmp_path, before)
    with monkeypatch.context() as patched:  # a file that has not changed is not read again
        for module, reader in ((readers, "sha256_of"), (data_files, "files_identity")):
            patched.setattr(module, reader, lambda _: pytest.fail("a file is read again"))
        assert differences(before, facts()) == ""
    times = path.stat()
    path.write_text(path.read_text()[::-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    with pytest.raises(CheckpointError, match=rf"config \(content of \S+ {name}: '\w+' there, '"):
        check_identity(tmp_path, facts())
    older = {key: value for key, value in before.items() if not key.startswith("content of ")}
    write(tmp_path, older)  # a run of before the contents were compared
    check_identity(tmp_path, facts())


def test_a_revision_of_the_hub_counts_if_both_starts_know_it(facts, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    ref = tmp_path / "models--owner--name" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    words = ["teacher.model=owner/name"]
    unknown = facts(*words)
    write(tmp_path, unknown)
    ref.write_text("abc")
    known = facts(*words)
    check_identity(tmp_path, known)
    write(tmp_path, known)
    check_identity(tmp_path, unknown)
    ref.write_text("def")

    with pytest.raises(CheckpointError, match=r"revision teacher.model: 'abc' there, 'def' here"):
        check_identity(tmp_path, facts(*words))


def test_a_finished_run_needs_no_files_and_no_device_of_its_own(facts, tmp_path):
    before = {**facts(), "on this device train": "bf16", "file task.dataset gone.csv": "1 byte"}
    write(tmp_path, before)

    check_identity(tmp_path, facts(), is_finished=True)
    with pytest.raises(CheckpointError, match=r"gone\.csv"):
        check_identity(tmp_path, facts())


@pytest.mark.parametrize("place", ["url=[http://other:1]", "model=other"])
def test_servers_may_be_elsewhere_and_not_others(tmp_path, place):
    server = {"url": ["http://node:1"], "push": "none", "model": "student"}
    task = {"type": "causal_lm", "dataset": "texts", "tokenizer": "gpt2"}
    rollout = {"max_new_tokens": 4, "prompt_tokens": 2, "server": server}
    models = {"teacher": {"model": "t"}, "method": {"name": "single"}, "rollout": rollout}
    tree = config_tree(tmp_path, task, **models)
    words = [f"rollout.server.{place}"]

    here, there = (fingerprint_of(config_of(tree, some), ALONE) for some in ((), words))

    assert bool(differences(here, there)) == place.startswith("model")


def write(out: Path, facts: dict[str, Any]) -> None:
    write_json(out / RUN, {"format": FORMAT, "facts": facts})
    (out / "stages" / "teacher-finetune").mkdir(parents=True, exist_ok=True)


def test_a_start_that_was_refused_before_its_first_result_binds_no_other(facts, tmp_path):
    write(tmp_path, facts())
    with pytest.raises(CheckpointError, match="seed: 42 there, 7 here"):
        check_identity(tmp_path, facts("seed=7"))
    (tmp_path / "stages" / "teacher-finetune").rmdir()

    check_identity(tmp_path, facts("seed=7"))


def test_a_run_is_written_once_and_one_of_another_version_is_refused(tmp_path):
    models = {"teacher": {"model": bert(1)}, "method": {"name": "single"}}
    out = tmp_path / "out"
    config = config_of(config_tree(out, review_task(tmp_path), **models))
    begin_run(config, ALONE)
    text = (out / RUN).read_text()
    begin_run(config, ALONE)
    assert (out / RUN).read_text() == text
    assert growable_keys(config)["train.max_steps"] == config.train.max_steps

    other = "holds a run of another version of megakd"
    for content, message in ((text[:40], r"run\.json is damaged"), ('{"format": 5}', other)):
        (out / RUN).write_text(content)
        with pytest.raises(CheckpointError, match=message):
            begin_run(config, ALONE)
    (out / RUN).unlink()
    (out / "checkpoints" / "student" / "step-3").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=other):
        begin_run(config, ALONE)
