"""A run that is there already: started again, changed, scored, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from reports import report_of
from tiny_runs import config_tree
from transformers import AutoTokenizer
from whole_run import finish, metrics_of, read

from megakd.config.file import config_of, dump_config, load_config
from megakd.errors import CheckpointError
from megakd.run.finished_run import is_finished
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
                *("holds a finished run of another config", "train.learning_rate: 0.01 there, 0.5"),
                *("seed: 42 there, 7 here", "to train its student further, set student.model="),
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


def write_finished_run(config, *, ranks=1):
    (config.output_dir / "config.yaml").write_text(dump_config(config))
    report = report_of(environment__ranks=ranks)
    (config.output_dir / "report.json").write_text(json.dumps(report))


def test_a_finished_run_is_finished_for_other_ranks_that_share_the_rows_of_a_step(config, tmp_path):
    alone = ["alone.weight_decay=0.1"]

    def asked(rows, micro_batches, *words):
        split = [f"train.per_device_train_batch_size={rows}"]
        split += [f"train.gradient_accumulation_steps={micro_batches}"]
        return load_config(config, [f"output_dir={tmp_path}", *split, *alone, *words])

    write_finished_run(asked(4, 3), ranks=2)

    assert is_finished(asked(24, 1))
    assert is_finished(asked(8, 3, "student.deepspeed=zero3"))
    with pytest.raises(CheckpointError, match=r"train: rows of a step of all ranks: 24 there, 4 h"):
        is_finished(asked(4, 1))
    with pytest.raises(CheckpointError, match=r"alone: rows of a step of all ranks: 24 there, 4 h"):
        is_finished(asked(4, 6, "alone.gradient_accumulation_steps=1"))


def test_a_finished_run_is_finished_wherever_its_servers_are(tmp_path):
    def asked(address, **server):
        url = [f"http://{address}:8000"]
        server = {"url": url, "push": "none", "model": "student", **server}
        task = {"type": "causal_lm", "dataset": "texts", "tokenizer": "gpt2"}
        rollout = {"max_new_tokens": 4, "prompt_tokens": 2, "server": server}
        method = {"name": "single"}
        return config_of(
            config_tree(tmp_path, task, teacher={"model": "t"}, method=method, rollout=rollout)
        )

    write_finished_run(asked("node1"))

    assert is_finished(asked("node7", time_limit=9))
    with pytest.raises(CheckpointError, match=r"rollout.server.model: 'student' there, 'other' h"):
        is_finished(asked("node7", model="other"))


@pytest.mark.parametrize("chooses", [False, True])
def test_evaluations_that_choose_no_weights_may_change_after_the_run(config, tmp_path, chooses):
    words = [f"output_dir={tmp_path}", f"eval.keep_best={str(chooses).lower()}"]
    write_finished_run(load_config(config, [*words, "eval.eval_steps=6"]))
    changed = load_config(config, [*words, "eval.eval_steps=2"])

    if chooses:
        with pytest.raises(CheckpointError, match=r"eval.eval_steps: 6 there, 2 here"):
            is_finished(changed)
    else:
        assert is_finished(changed)


def test_a_run_of_a_version_with_fewer_keys_is_still_finished(one_rank, out, config, tmp_path):
    """Keys that it does not have are at their defaults, as they were then."""
    older = Path(shutil.copytree(out, tmp_path / "older"))
    lines = (older / "config.yaml").read_text().splitlines(keepends=True)
    fewer = [line for line in lines if "cache_top_k" not in line and "teachers:" not in line]
    assert len(fewer) == len(lines) - 2
    (older / "config.yaml").write_text("".join(fewer))

    outcome = one_rank.train("--config", config, f"output_dir={older}", code=0)

    assert outcome.loaded == ()


def test_a_run_of_a_version_with_other_keys_is_named_as_it_is(one_rank, out, config, tmp_path):
    other = Path(shutil.copytree(out, tmp_path / "other"))
    (other / "config.yaml").write_text((other / "config.yaml").read_text() + "forgotten: 3\n")
    outcome = one_rank.train("--config", config, f"output_dir={other}", code=2)
    assert f"{other} holds a finished run whose config this version cannot read" in outcome.err
    assert "forgotten = 3: unknown key" in outcome.err


@pytest.fixture
def unfinished(out, tmp_path) -> Path:
    """The run as a kill before its last stages would have left it, the teacher being done."""
    copy = tmp_path / "unfinished"
    shutil.copytree(out, copy)
    (copy / "report.json").unlink()
    for name in ("final", "stages/student", "stages/alone", "checkpoints/student"):
        shutil.rmtree(copy / name)
    return copy


def test_a_fine_tuned_teacher_is_used_again_when_only_the_student_changes(
    one_rank, out, config, unfinished
):
    outcome = finish(
        one_rank,
        config,
        f"output_dir={unfinished}",
        "student.model.config.hidden_size=8",
        "objective.0.temperature=4.0",
        "baselines=[]",
    )

    assert "teacher-finetune: already finished" in outcome.err
    assert "teacher-finetune: no checkpoint" not in outcome.err
    assert metrics_of(read(unfinished), "teacher") == metrics_of(read(out), "teacher")
    assert read(unfinished)["student.parameters"] < read(out)["student.parameters"]
    stages = {stage["name"]: stage for stage in read(unfinished)["stages"]}
    assert stages["teacher-finetune"] == read(out)["stages"][0]


def test_a_fine_tuned_teacher_is_not_used_for_another_config(one_rank, config, unfinished):
    outcome = one_rank.train(
        "--config", config, f"output_dir={unfinished}", "teacher.finetune.learning_rate=0.5", code=2
    )

    stage = unfinished / "stages" / "teacher-finetune"
    assert f"{stage} holds the result of another config (" in outcome.err
    assert "train.learning_rate: 0.003 there, 0.5 here" in outcome.err
    assert outcome.loaded == ()


def test_checkpoints_of_another_config_are_refused_naming_what_differs(
    one_rank, out, config, unfinished
):
    shutil.copytree(out / "checkpoints" / "student", unfinished / "checkpoints" / "student")
    outcome = one_rank.train("--config", config, f"output_dir={unfinished}", "train.max_steps=99")
    assert outcome.code == 2
    assert "train.max_steps" in outcome.err
    assert "99" in outcome.err


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
