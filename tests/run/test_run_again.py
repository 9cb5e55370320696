"""A run that is there already: started again, changed, scored, exported."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from whole_run import finish, read, same_weights

from megakd.process.seals import write_finished


def test_a_finished_run_started_again_prints_its_table_and_loads_nothing(
    one_rank, whole_run, out, config
):
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    free = (
        *("save.save_steps=3", "log.logging_steps=7", "eval.per_device_eval_batch_size=3"),
        *("train.kernels=reference", "student.deepspeed={zero_optimization: {stage: 2}}"),
    )

    again = finish(one_rank, config, *free)

    assert whole_run.outcome.out.endswith(again.out)
    assert again.out.count("\n") > 5
    assert again.loaded == ()
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.learning_rate=0.5", "seed=7"],
            "holds a run of another config .*seed: 42 there, 7 here.*"
            r"train\.learning_rate: 0\.01 there, 0\.5.*may start from its models, such as",
        ),
    ],
    ids=["another config"],
)
def test_a_finished_folder_is_not_overwritten(one_rank, out, config, overrides, message):
    outcome = one_rank.train("--config", config, *overrides, code=2)
    assert re.search(f"{out} {message}", outcome.err, re.DOTALL)
    assert "weight_decay" not in outcome.err
    assert outcome.loaded == ()


@pytest.fixture
def unfinished(out, tmp_path) -> Path:
    """The run as a kill before its last stages would have left it, the teacher being done."""
    copy = tmp_path / "unfinished"
    shutil.copytree(out, copy)
    (copy / "report.json").unlink()
    for name in ("final", "stages/student", "stages/alone", "checkpoints/student"):
        shutil.rmtree(copy / name)
    return copy


def test_a_killed_run_goes_on_with_its_finished_stages(one_rank, out, config, unfinished):
    outcome = finish(one_rank, config, f"output_dir={unfinished}")

    assert "teacher-finetune: already finished" in outcome.err
    assert read(unfinished)["stages"][0] == read(out)["stages"][0]
    assert same_weights(unfinished / "final", out / "final")


def test_a_killed_run_does_not_go_on_with_another_config(one_rank, config, unfinished):
    override = "teacher.finetune.learning_rate=0.5"
    outcome = one_rank.train("--config", config, f"output_dir={unfinished}", override, code=2)

    assert f"{unfinished} holds a run of another config (" in outcome.err
    assert "learning_rate: 0.003 there, 0.5 here" in outcome.err
    assert outcome.loaded == ()


def test_a_stage_is_exported_once(one_rank, out, config, tmp_path):
    target, words = tmp_path / "deep" / "teacher", ("export", config, "--stage", "teacher-finetune")

    outcome = one_rank.megakd(*words, "--to", target, code=0)

    assert outcome.out.strip() == str(target)
    weights, stage = "model.safetensors", out / "stages" / "teacher-finetune"
    assert (target / weights).read_bytes() == (stage / weights).read_bytes()
    assert not (target / "result.json").exists()
    assert (target / "checksums.json").is_file()
    AutoTokenizer.from_pretrained(target)
    again = one_rank.megakd(*words, "--to", target, code=2)
    assert f"{target} already exists" in again.err

    one_rank.megakd("export", config, "--to", tmp_path / "student", code=0)
    assert (tmp_path / "student" / weights).read_bytes() == (out / "final" / weights).read_bytes()

    (tmp_path / "file").touch()
    below = one_rank.megakd("export", config, "--to", tmp_path / "file" / "deep", code=2)
    assert f"megakd: error: --to: {tmp_path / 'file'} is not a writable folder" in below.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "give --stage NAME;"),
        ("teacher-finetun", 'has no stage "teacher-finetun"; did you mean "teacher-finetune"?'),
        ("assistant", "has not finished;"),
        ("teacher-scored", "gives no model;"),  # only scores
    ],
)
def test_a_stage_without_a_model_is_not_exported(
    one_rank, config, unfinished, tmp_path, name, message
):
    (unfinished / "stages" / "assistant").mkdir()
    write_finished(unfinished / "stages" / "teacher-scored", {"result.json": "{}"})
    words = ["--to", tmp_path / "x", *(("--stage", name) if name else ())]

    outcome = one_rank.megakd("export", config, f"output_dir={unfinished}", *words, code=2)

    assert f"{message} finished stages: teacher-finetune\n" in outcome.err
    assert (name or "") in outcome.err
    assert not (tmp_path / "x").exists()
