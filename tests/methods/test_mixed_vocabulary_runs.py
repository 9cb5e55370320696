"""Mixed vocabularies through the real commands: results, stops, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_store import flip
from mixed_runs import mixed, plain, words
from safetensors.torch import load_file
from tiny_runs import NO_DROPOUT, bert, write_jsonl
from transformers import AutoModelForMaskedLM, AutoTokenizer
from whole_run import finish, read, same_weights, unexplained

from megakd.errors import CheckpointError, ModelError
from megakd.process.seals import check_given, verified_entries


def same_models(one: Path, other: Path) -> bool:
    """Whether all weights below two folders are equal."""
    ours, theirs = (
        {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*.safetensors")}
        for folder in (one, other)
    )
    return ours == theirs


EVALUATED: dict[str, Any] = {"eval": {"eval_steps": 3, "keep_best": True}}


@pytest.fixture(scope="module")
def trained(one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    outcome = finish(one_rank, mixed(folder, **EVALUATED, baselines=["alone", "patient_kd"]))
    assert "100 pieces trained on the training text" in outcome.err
    return folder / "out"


def test_the_student_is_a_plain_model_with_its_own_vocabulary(trained):
    model = AutoModelForMaskedLM.from_pretrained(trained / "final")
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")

    assert (model.config.vocab_size, len(tokenizer)) == (100, 100)
    assert model.config.hidden_size == 8
    names = load_file(trained / "final" / "model.safetensors").keys()
    assert not [name for name in names if "second" in name or "projection" in name]
    encoded = tokenizer(" ".join(words()), return_tensors="pt", truncation=True, max_length=24)
    assert model(**encoded).logits.isfinite().all()


def test_the_student_leaves_without_its_teacher(one_rank, trained, tmp_path):
    exported = tmp_path / "exported"
    one_rank.megakd("export", trained.parent / "run.yaml", "--to", exported, code=0)

    for folder in (trained / "final", exported):
        assert not (folder / "teacher").exists()
        assert not [*folder.rglob("second_vocabulary*")]


def test_the_stage_keeps_the_teacher_with_its_tokenizer_and_both_vocabularies(trained):
    folder = trained / "stages" / "student" / "teacher"

    teacher = AutoModelForMaskedLM.from_pretrained(folder)

    assert teacher.config.vocab_size == len(AutoTokenizer.from_pretrained(folder)) > 100
    second = load_file(folder / "second_vocabulary.safetensors")
    assert second["table.weight"].shape == (100, 16)
    # The best evaluation has every model that learns.
    (best,) = (trained / "checkpoints" / "student" / "best").glob("step-*/teacher")
    assert same_weights(best, folder)


def test_damage_of_a_model_that_learned_beside_another_is_found(trained, tmp_path):
    stage = Path(shutil.copytree(trained / "stages" / "student", tmp_path / "student"))
    flip(stage / "teacher" / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"checksum of teacher/model\.safetensors differs"):
        verified_entries(stage, remedy="")
    with pytest.raises(ModelError, match=r"checksum of model\.safetensors differs"):
        check_given(stage / "teacher", "teacher.model")


def test_the_report_compares_models_by_nats_per_character(one_rank, trained):
    report = read(trained)

    assert report["metric_name"] == "nats_per_character"
    assert "vocabulary.overlap" in one_rank.page(trained)
    assert report["vocabulary.size"] == 100
    assert report["vocabulary.teacher_size"] > 100
    assert 0.5 < report["vocabulary.overlap"] <= 1
    assert {*report["baselines"]} == {"alone", "patient_kd"}
    assert unexplained(trained) == []
    assert report["student.nats_per_character"] > 0
    assert report["teacher.nats_per_character"] > 0
    assert report["samples"]
    assert all(sample["teacher"] is None for sample in report["samples"])


def test_a_stopped_run_goes_on_to_the_same_weights_of_both_models(one_rank, trained, tmp_path):
    path = mixed(tmp_path, save={"save_steps": 1}, **EVALUATED)

    assert one_rank.train("--config", path, stop_at=("student", 4)).code != 0
    outcome = finish(one_rank, path)

    assert "student: resumed at step 5" in outcome.err
    assert same_models(*(out / "stages" / "student" for out in (tmp_path / "out", trained)))


def test_a_changed_option_trains_the_stage_again(one_rank, trained):
    for changed in ("p=0.25", "teacher_learning_rate=0.001", "projections=up"):
        config = trained.parent / "run.yaml"
        outcome = one_rank.train("--config", config, f"method.{changed}", code=2)

        assert "another config" in outcome.err


def test_the_student_is_fine_tuned_by_the_config_that_the_run_writes(one_rank, trained, tmp_path):
    rows = ({"text": word, "label": "long" if len(word) > 4 else "short"} for word in words())

    finish(
        one_rank,
        trained / "finetune.yaml",
        f"task.dataset={write_jsonl(tmp_path / 'task.jsonl', rows)}",
        "task.label_column=label",
        "train.max_steps=3",
        "eval.latency=false",
        f"output_dir={tmp_path / 'tuned'}",
    )

    assert len(AutoTokenizer.from_pretrained(tmp_path / "tuned" / "final")) == 100


def test_a_plan_covers_both_models_and_both_vocabularies(one_rank, tmp_path):
    peaks = {}
    for kind in ("dual", "down"):
        path = mixed(tmp_path / kind, method={"projections": kind})
        outcome = one_rank.megakd("plan", path, "--json", code=0)
        peaks[kind] = json.loads(outcome.out)["roles"]["student"]["weights"]

    assert peaks["dual"] < peaks["down"]


def test_words_that_the_teacher_does_not_know_are_unknown_to_it_and_its_tokenizer_is_compared(
    one_rank, tmp_path
):
    mixed(tmp_path)
    text, known = tmp_path / "text.txt", tmp_path / "known.txt"
    known.write_bytes(text.read_bytes())
    finish(one_rank, plain(tmp_path / "teacher", known))
    with text.open("a", encoding="utf-8") as more:
        more.write("".join(f"\n\n\u0436\u0448 {word}" for word in words()))
    folder = tmp_path / "teacher/out/final"
    sections = {"teacher": {"model": str(folder)}, "baselines": ["patient_kd"]}
    path = mixed(tmp_path, task={"tokenizer": None}, method={"p": 0.0}, **sections)

    finish(one_rank, path)

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = [*vocabulary][-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "checksums.json").unlink()
    again = one_rank.train("--config", path, code=2)
    assert "file teacher.model final/tokenizer.json" in again.err


def test_each_model_is_evaluated_with_its_own_tokenizer(one_rank, trained, tmp_path):
    configs = trained.parent / "run.yaml", plain(tmp_path, trained.parent / "text.txt")

    def metrics_of(config: Path, model: Path) -> dict[str, float]:
        outcome = one_rank.megakd("evaluate", config, "--model", model, "--json", code=0)
        return json.loads(outcome.out)["metrics"]

    student = metrics_of(configs[0], trained / "final")
    report = read(trained)
    assert student == pytest.approx({name: report[f"student.{name}"] for name in student})
    teacher = trained / "stages/student/teacher"
    assert metrics_of(configs[0], teacher) == pytest.approx(metrics_of(configs[1], teacher))


def test_a_student_without_a_teacher_reads_the_rows_of_the_others(one_rank, tmp_path):
    """No term of `dual` contains both models, so that equal students have read equal rows."""
    sections = {"method": {"projections": "dual"}, "train": {"max_grad_norm": 0.0}}
    sections |= {"student": {"model": bert(2, 8, **NO_DROPOUT)}, "baselines": ["alone"]}

    finish(one_rank, mixed(tmp_path, **sections))

    assert same_models(tmp_path / "out/final", tmp_path / "out/stages/alone")


@pytest.mark.parametrize(
    ("message", "override"),
    [
        ("has 2 layers and the student 1", "student.model.config.num_hidden_layers=1"),
        ("bert and the student of type electra", "student.model.config.model_type=electra"),
        ("vocabulary is 5000", "method.student_vocabulary=5000"),
        ("the two vocabularies cut the text into different words", "task.tokenizer.type=bpe"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(one_rank, tmp_path, message, override):
    outcome = one_rank.train("--config", mixed(tmp_path), override, code=2)

    assert message in outcome.err
    assert not outcome.loaded
    assert "Traceback" not in outcome.err
