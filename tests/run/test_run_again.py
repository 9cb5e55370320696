"""A run that is there already: started again, changed, scored, exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from whole_run import finish, read, same_weights

from megakd.storage.folders import write_finished


def test_a_finished_run_started_again_prints_its_table_and_loads_nothing(
    one_rank, whole_run, out, config
):
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}

    free = (
        *("save.save_steps=3", "log.logging_steps=7", "eval.per_device_eval_batch_size=3"),
        *("train.kernels=reference", "student.deepspeed={zero_optimization: {stage: 2}}"),
    )
    again = finish(one_rank, config, *free)

    assert (
        again.out.splitlines() == whole_run.outcome.out.splitlines()[-len(again.out.splitlines()) :]
    )
    assert again.loaded == ()
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (
            ["train.resume_from_checkpoint=false"],
            ["holds a run and train.resume_from_checkpoint is false"],
        ),
        (
            ["train.learning_rate=0.5", "seed=7"],
            [
                *("holds a run of another config", "train.learning_rate: 0.01 there, 0.5"),
                *("seed: 42 there, 7 here", "may start from its models, such as"),
            ],
        ),
    ],
    ids=["not resumed", "another config"],
)
def test_a_finished_folder_is_not_overwritten(one_rank, out, config, overrides, fragments):
    outcome = one_rank.train("--config", config, *overrides, code=2)
    assert all(text in outcome.err for text in [str(out), *fragments])
    assert "weight_decay" not in outcome.err
    assert outcome.loaded == ()


def test_models_are_timed_again_without_training_if_the_times_asked_for_change(
    one_rank, whole_run, tmp_path
):
    out = Path(shutil.copytree(whole_run.out, tmp_path / "out"))

    for setting, batches in {"false": [], "true": [1, 32]}.items():
        finish(one_rank, whole_run.config, f"output_dir={out}", f"eval.latency={setting}")

        assert read(out)["batches"] == batches
        assert read(out)["stages"] == read(whole_run.out)["stages"]


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.finetune.learning_rate=0.5", "learning_rate: 0.003 there, 0.5 here"),
        ("student.model.config.hidden_size=8", "student.model.config.hidden_size: "),
        ("baselines=[]", "baselines"),
    ],
)
def test_a_killed_run_does_not_go_on_with_another_config(
    one_rank, config, unfinished, override, message
):
    outcome = one_rank.train("--config", config, f"output_dir={unfinished}", override, code=2)

    assert f"{unfinished} holds a run of another config (" in outcome.err
    assert message in outcome.err
    assert outcome.loaded == ()


def test_a_stage_is_exported_once(one_rank, out, config, tmp_path):
    target = tmp_path / "deep" / "teacher"

    outcome = one_rank.megakd("export", config, "--stage", "teacher-finetune", "--to", target)

    assert (outcome.code, outcome.out.strip()) == (0, str(target)), outcome.err
    weights = "model.safetensors"
    stage = out / "stages" / "teacher-finetune"
    assert (target / weights).read_bytes() == (stage / weights).read_bytes()
    assert not (target / "result.json").exists()
    assert (target / "checksums.json").is_file()
    AutoTokenizer.from_pretrained(target)
    again = one_rank.megakd("export", config, "--stage", "teacher-finetune", "--to", target, code=2)
    assert f"{target} already exists" in again.err

    one_rank.megakd("export", config, "--to", tmp_path / "student", code=0)
    assert (tmp_path / "student" / weights).read_bytes() == (out / "final" / weights).read_bytes()

    (tmp_path / "file").touch()
    below = one_rank.megakd("export", config, "--to", tmp_path / "file" / "deep", code=2)
    assert f"megakd: error: --to: {tmp_path / 'file'} is not a writable folder" in below.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --stage NAME; finished stages: teacher-finetune"),
        (
            ("--stage", "teacher-finetun"),
            'has no stage "teacher-finetun"; did you mean "teacher-finetune"? finished stages: tea',
        ),
        (("--stage", "assistant"), "has not finished; finished stages: teacher-finetune"),
        # It gives only scores.
        (("--stage", "teacher-scored"), "gives no model; finished stages: teacher-finetune\n"),
    ],
)
def test_a_stage_without_a_model_is_not_exported(
    one_rank, config, unfinished, tmp_path, words, message
):
    (unfinished / "stages" / "assistant").mkdir()
    write_finished(unfinished / "stages" / "teacher-scored", {"result.json": "{}"})

    to = ("--to", tmp_path / "x")
    outcome = one_rank.megakd("export", config, f"output_dir={unfinished}", *words, *to, code=2)

    assert message in outcome.err
    assert all(word in outcome.err for word in words[1:])
    assert not (tmp_path / "x").exists()
