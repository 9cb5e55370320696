"""Mixed vocabularies through the real commands: results, stops, and settings that cannot work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mixed_runs import SENTENCEPIECE, mixed, plain, words
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights below a folder by path and name."""
    return {
        f"{file.relative_to(folder)}:{name}": weight
        for file in sorted(folder.rglob("*.safetensors"))
        for name, weight in load_file(file).items()
    }


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def trained(one_rank, tmp_path_factory) -> Path:
    """A run of version 1 with both baselines."""
    folder = tmp_path_factory.mktemp("mixed")
    path = mixed(folder, baselines=["alone", "patient_kd"], eval={"eval_steps": 3})
    said = one_rank.train("--config", path)
    assert said.code == 0, said.err
    assert "100 pieces trained on the training text" in said.err
    return folder / "out"


@pytest.fixture(scope="module")
def after_teacher(one_rank, tmp_path_factory) -> Path:
    """A run of version 2."""
    folder = tmp_path_factory.mktemp("mixed-2")
    path = mixed(folder, method={"version": 2, "teacher_steps": 4})
    said = one_rank.train("--config", path)
    assert said.code == 0, said.err
    return folder / "out"


@pytest.mark.parametrize("made", ["trained", "after_teacher"])
def test_the_student_is_a_plain_model_with_its_own_vocabulary(made, request):
    out = request.getfixturevalue(made)

    model = AutoModelForMaskedLM.from_pretrained(out / "final")
    tokenizer = AutoTokenizer.from_pretrained(out / "final")

    assert (model.config.vocab_size, len(tokenizer)) == (100, 100)
    assert model.config.hidden_size == 8
    names = load_file(out / "final" / "model.safetensors").keys()
    assert not [name for name in names if "second" in name or "projection" in name]
    encoded = tokenizer(" ".join(words()), return_tensors="pt", truncation=True, max_length=24)
    assert model(**encoded).logits.isfinite().all()


@pytest.mark.parametrize("exported", [False, True])
def test_the_student_leaves_without_its_teacher(one_rank, trained, tmp_path, exported):
    folder = trained / "final"
    if exported:
        folder = tmp_path / "exported"
        said = one_rank.megakd("export", trained.parent / "run.yaml", "--to", folder)
        assert said.code == 0, said.err

    assert not (folder / "teacher").exists()
    assert not [*folder.rglob("second_vocabulary*")]


def test_the_stage_keeps_the_teacher_with_its_tokenizer_and_both_vocabularies(trained):
    folder = trained / "stages" / "student" / "teacher"

    teacher = AutoModelForMaskedLM.from_pretrained(folder)

    assert teacher.config.vocab_size == len(AutoTokenizer.from_pretrained(folder)) > 100
    second = load_file(folder / "second_vocabulary.safetensors")
    assert second["table.weight"].shape == (100, 16)


def test_the_report_compares_models_by_nats_per_character(trained):
    report = json.loads((trained / "report.json").read_text())

    assert report["metric_name"] == "nats_per_character"
    assert report["vocabulary"]["size"] == 100
    assert report["vocabulary"]["teacher_size"] > 100
    assert 0.5 < report["vocabulary"]["overlap"] <= 1
    assert report["baselines"].keys() == {"alone", "patient_kd"}
    assert report["student"]["metrics"]["nats_per_character"] > 0
    assert report["teacher"]["metrics"]["nats_per_character"] > 0
    assert all(sample["teacher"] is None for sample in report["samples"])


def test_the_teacher_is_scored_on_text_in_its_own_tokens(one_rank, trained, tmp_path):
    """The scores of the report are those of the same model in a run of its own."""
    report = json.loads((trained / "report.json").read_text())
    path = plain(tmp_path, trained.parent / "text.txt")

    said = one_rank.train("--config", path, "train.learning_rate=0", "train.max_steps=1")

    assert said.code == 0, said.err
    own = json.loads((tmp_path / "out" / "report.json").read_text())["student"]["metrics"]
    assert report["teacher"]["metrics"] == pytest.approx(own)


def test_the_student_starts_from_the_table_that_its_teacher_learned(after_teacher):
    stages = json.loads((after_teacher / "report.json").read_text())["stages"]

    assert [(stage["name"], stage["steps"]) for stage in stages] == [
        ("mixed-teacher", 4),
        ("student", 6),
    ]
    second = load_file(after_teacher / "stages/mixed-teacher/second_vocabulary.safetensors")
    assert second["table.weight"].shape == (100, 8)
    assert second["lift.weight"].shape == (16, 8)


@pytest.mark.parametrize("method", [{}, {"version": 2}], ids=["version 1", "version 2"])
def test_a_stopped_run_goes_on_to_the_same_weights_of_all_models(
    one_rank, tmp_path, trained, method
):
    stages = {"student": 4, "mixed-teacher": 2} if method else {"student": 4}
    paths = [
        mixed(tmp_path / name, method=method, save={"save_steps": 1}) for name in ("cut", "whole")
    ]

    for stage, step in reversed(stages.items()):
        stopped = one_rank.train("--config", paths[0], stop_at=(stage, step))
        assert stopped.code != 0
    said = [one_rank.train("--config", path) for path in paths]

    assert [one.code for one in said] == [0, 0], said[0].err
    assert f"student: resumed at step {stages['student'] + 1}" in said[0].err
    assert_same_weights(tmp_path / "cut/out/stages", tmp_path / "whole/out/stages")


def test_a_changed_option_trains_the_stage_again(one_rank, tmp_path):
    first = one_rank.train("--config", mixed(tmp_path))
    for method in ({"p": 0.25}, {"teacher_learning_rate": 0.001}, {"projections": "up"}):
        path = mixed(tmp_path, method=method)
        said = one_rank.train("--config", path)

        assert said.code != 0
        assert "another config" in said.err
    assert first.code == 0, first.err


def test_a_finished_run_prints_its_table_again(one_rank, trained):
    path = trained.parent / "run.yaml"

    said = one_rank.train("--config", path)

    assert said.code == 0, said.err
    assert said.loaded == ()
    assert "student's vocabulary: wordpiece of 100 pieces" in said.out


def test_the_student_is_fine_tuned_by_the_config_that_the_run_writes(one_rank, trained, tmp_path):
    rows = [
        json.dumps({"text": word, "label": "long" if len(word) > 4 else "short"})
        for word in words()
    ]
    (tmp_path / "task.jsonl").write_text("\n".join(rows), encoding="utf-8")

    said = one_rank.train(
        "--config",
        trained / "finetune.yaml",
        f"task.dataset={tmp_path / 'task.jsonl'}",
        "task.label_column=label",
        "train.max_steps=3",
        f"output_dir={tmp_path / 'tuned'}",
    )

    assert said.code == 0, said.err
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tuned" / "final")) == 100


def test_a_plan_covers_both_models_and_both_vocabularies(one_rank, tmp_path):
    peaks = {}
    for kind in ("none", "dual", "down"):
        path = mixed(tmp_path / kind, method={"projections": kind})
        said = one_rank.megakd("plan", path, "--json")
        assert said.code == 0, said.err
        peaks[kind] = json.loads(said.out)["roles"]["student"]["weights"]

    assert peaks["none"] < peaks["dual"] < peaks["down"]


ELECTRA = {
    "config": {
        "model_type": "electra",
        "num_hidden_layers": 2,
        "hidden_size": 12,
        "embedding_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
    }
}


def test_a_student_with_a_table_narrower_than_its_states_starts_from_its_teachers(
    one_rank, tmp_path
):
    path = mixed(tmp_path, method={"version": 2}, student={"model": ELECTRA})

    said = one_rank.train("--config", path)

    assert said.code == 0, said.err
    folder = tmp_path / "out/stages/mixed-teacher"
    assert load_file(folder / "second_vocabulary.safetensors")["table.weight"].shape == (100, 8)


def test_the_table_of_the_last_step_is_handed_over(one_rank, tmp_path):
    # The teacher's own text is learned best at once, and forgotten at this rate.
    path = mixed(
        tmp_path,
        method={"version": 2, "p": 1.0},
        train={"learning_rate": 0.3},
        eval={"eval_steps": 1},
    )

    said = one_rank.train("--config", path)

    assert said.code == 0, said.err
    best = tmp_path / "out/checkpoints/mixed-teacher/best/best.json"
    assert json.loads(best.read_text())["step"] == 6


@pytest.mark.parametrize("sections", [{"baselines": ["patient_kd"]}, {"method": {"p": 0.0}}])
def test_words_that_the_teacher_does_not_know_are_unknown_to_it(one_rank, tmp_path, sections):
    mixed(tmp_path)
    known = (tmp_path / "text.txt").read_text()
    (tmp_path / "known.txt").write_text(known, encoding="utf-8")
    teacher = one_rank.train("--config", plain(tmp_path / "teacher", tmp_path / "known.txt"))
    rare = "".join(f"\n\n\u0436\u0448 {word}" for word in words())
    (tmp_path / "text.txt").write_text(known + rare, encoding="utf-8")
    folder = str(tmp_path / "teacher/out/final")

    said = one_rank.train(
        "--config", mixed(tmp_path, task={"tokenizer": None}, teacher={"model": folder}, **sections)
    )

    assert (teacher.code, said.code) == (0, 0), said.err


def test_each_model_is_evaluated_with_its_own_tokenizer(one_rank, trained, tmp_path):
    report = json.loads((trained / "report.json").read_text())
    own = plain(tmp_path, trained.parent / "text.txt")
    teacher = trained / "stages/student/teacher"
    configs = {"mixed": trained.parent / "run.yaml", "own": own}

    def metrics_of(config: str, model: Path) -> dict[str, float]:
        said = one_rank.megakd("evaluate", configs[config], "--model", model, "--json")
        assert said.code == 0, said.err
        return json.loads(said.out)["metrics"]

    student = metrics_of("mixed", trained / "final")
    assert student == pytest.approx(report["student"]["metrics"])
    mixed_run, own_run = (metrics_of(name, teacher) for name in configs)
    assert mixed_run == pytest.approx(own_run)


def test_a_finished_run_is_compared_with_the_tokenizer_of_the_teacher(one_rank, tmp_path):
    mixed(tmp_path)
    made = one_rank.train("--config", plain(tmp_path / "teacher", tmp_path / "text.txt"))
    folder = tmp_path / "teacher/out/final"
    path = mixed(tmp_path, task={"tokenizer": None}, teacher={"model": str(folder)})
    first = one_rank.train("--config", path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = [*vocabulary][-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "checksums.json").unlink()

    again = one_rank.train("--config", path)

    assert (made.code, first.code) == (0, 0), first.err
    assert again.code != 0
    assert "task.tokenizer" in again.err


def test_a_vocabulary_of_sentencepiece_is_used_alone(one_rank, tmp_path):
    path = mixed(tmp_path, method={**SENTENCEPIECE, "projections": "none"})

    said = one_rank.train("--config", path)

    assert said.code == 0, said.err
    final = tmp_path / "out" / "final"
    assert (final / "spiece.model").is_file()
    assert len(AutoTokenizer.from_pretrained(final)) == 100
