"""The key that a message blames, and the word that it offers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from run_files import RUN, message_of

from megakd import cli
from megakd.commands.scored_models import model_folder
from megakd.config.file import load_config
from megakd.config.schema import SYNONYMS, annotation_at
from megakd.errors import MegakdError


def test_a_mistake_of_the_file_names_the_file_whatever_is_overridden(run_file):
    run_file.write_text(RUN + "train: {max_steps: -1}\n", encoding="utf-8")

    text = message_of(run_file, "seed=7")

    assert text == f"{run_file}: train.max_steps: must be at least 1 (got -1)"


@pytest.mark.parametrize(
    ("overrides", "blamed"),
    [
        (
            "train.max_steps=3; student.lora.r=4; student.layers=1",
            '"student.lora.r=4": student.lora: ',
        ),
        ("seed=1; task.evaluation_sets.2024=[]", '"task.evaluation_sets.2024=[]": '),
        (
            "train.bf16=true; train.fp16=true",
            '"train.bf16=true train.fp16=true": train: bf16 and fp16',
        ),
    ],
    ids=["a section that it fills", "a set named by a number", "two that contradict each other"],
)
def test_the_overrides_of_a_mistake_alone_are_blamed(run_file, overrides, blamed):
    text = message_of(run_file, *overrides.split("; "))

    assert text.startswith(f"override {blamed}")
    assert str(run_file) not in text
    assert "max_steps" not in text


def test_mistakes_of_both_are_told_apart(run_file):
    run_file.write_text(RUN + "train: {max_steps: -1}\n", encoding="utf-8")

    first, *lines = message_of(run_file, "objective=[{loss: soft_target_k}]").split("\n")

    assert first == "2 problems"
    assert any(line.startswith(f"  {run_file}: train.max_steps") for line in lines)
    override = '  override "objective=[{loss: soft_target_k}]": '
    assert any(line.startswith(override) for line in lines)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lr=1", '"train.learning_rate"'),
        ("train.lr=1", '"learning_rate"'),
        ("batch_size=1", '"train.per_device_train_batch_size"'),
        ("epochs=1", '"train.num_train_epochs"'),
        ("model_name_or_path=x", '"student.model" or "teacher.model"'),
        ("teacher.model_name_or_path=x", '"model"'),
        ("per_device_eval_batch_size=1", '"eval.per_device_eval_batch_size"'),
        ("train.per_device_eval_batch_size=1", '"eval.per_device_eval_batch_size"'),
        ("max_seq_length=1", '"task.max_length"'),
        ("teacher.finetune={epochs: 1}", '"num_train_epochs"'),
    ],
)
def test_names_of_hugging_face_are_known(run_file, override, meant):
    assert f"unknown key; did you mean {meant}?" in message_of(run_file, override)


def test_an_option_named_as_hugging_face_names_it_is_told_as_a_setting(run_file, capsys):
    cli.main(["train", "--config", str(run_file), "--lr", "1e-4"])

    assert "settings are written train.learning_rate=value" in capsys.readouterr().err


@pytest.mark.parametrize("word", SYNONYMS)
def test_every_synonym_stands_for_keys_that_exist_and_is_none_itself(word):
    tree = {"task": {}, "teacher": {}, "student": {}, "train": {}}
    for key in SYNONYMS[word]:
        assert annotation_at(tuple(key.split(".")), tree) is not None
        section = key.rpartition(".")[0]
        path = (*section.split("."), word) if section else (word,)
        assert annotation_at(path, tree) is None


@pytest.mark.parametrize("begun", [True, False])
def test_the_folder_of_a_run_stands_for_its_config_also_at_a_new_place(run_file, tmp_path, begun):
    moved = tmp_path / "moved"
    moved.mkdir()
    run_file.rename(moved / "config.yaml")
    if begun:
        (moved / "metrics.jsonl").touch()

    here, written = load_config(moved), load_config(moved / "config.yaml")

    assert here == (replace(written, output_dir=moved) if begun else written)
    assert load_config(moved, ["output_dir=elsewhere"]).output_dir == Path("elsewhere")


def test_an_evaluated_model_is_found_in_the_home_folder_or_named(run_file, monkeypatch):
    config = load_config(run_file)
    monkeypatch.setenv("HOME", str(run_file.parent))

    with pytest.raises(MegakdError) as given:
        model_folder(config, "nosuch")
    with pytest.raises(MegakdError, match="train first, or give --model FOLDER"):
        model_folder(config, None)

    assert str(given.value).startswith("--model nosuch: the folder does not exist")
    assert "give --model" not in str(given.value)
    assert model_folder(config, "~") == run_file.parent
