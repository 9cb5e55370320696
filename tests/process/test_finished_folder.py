"""Folders that megakd has finished: their checksums find damage and leave a user's changes be."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from megakd.errors import CheckpointError, ModelError
from megakd.process import seals
from megakd.process.seals import (
    CARD,
    CHECKSUMS,
    check_given,
    copy_finished,
    damage,
    sealed_folder,
    users_files,
    verified_entries,
)

FILES = {"model.safetensors": "weights", "config.json": "{}", "tokenizer.json": "[]", CARD: "card"}
REMEDY = "remove the folder"


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    with sealed_folder(folder) as made:
        for name, text in FILES.items():
            (made / name).write_text(text)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_file_is_refused_naming_the_file_and_what_to_do(finished, tmp_path, name):
    (finished / name).write_text("x" * len(FILES[name]))

    message = f"{finished} is damaged: the checksum of {name} differs; {REMEDY}"
    with pytest.raises(CheckpointError, match=message):
        verified_entries(finished, remedy=REMEDY)
    with pytest.raises(ModelError, match=f"teacher.model: .*{name} differs; copy the folder again"):
        check_given(finished, "teacher.model")
    # Only files that are read have to be whole.
    check_given(finished, "task.tokenizer", wanted=lambda other: other == "tokenizer.json")
    with pytest.raises(CheckpointError, match=f"{name} differs"):
        copy_finished(finished, tmp_path / "final", changes={}, remedy=REMEDY)
    assert not (tmp_path / "final").exists()


def test_a_changed_card_and_added_files_are_the_users_own(finished, tmp_path):
    assert users_files(finished) == users_files(tmp_path / "nothing") == []
    (finished / CARD).write_text("what I think of the model")
    (finished / "notes.txt").write_text("mine")

    verified_entries(finished, remedy=REMEDY)
    check_given(finished, "teacher.model")
    assert users_files(finished) == [CARD, "notes.txt"]
    (finished / CHECKSUMS).unlink()
    assert len(users_files(finished)) == 5


@pytest.mark.parametrize("name", ["tokenizer.json", CHECKSUMS])
def test_a_missing_file_is_damage_in_a_run_and_allowed_in_a_folder_from_elsewhere(finished, name):
    """The Hub gives only the files that were asked for, and megakd did not write all folders."""
    (finished / name).unlink()

    with pytest.raises(CheckpointError, match=name):
        verified_entries(finished, remedy=REMEDY)
    check_given(finished, "teacher.model")


@pytest.mark.parametrize("text", ["{", "null", '{"files": 3}', '{"files": {"a": {}}}'])
def test_damaged_checksums_are_damage_themselves(finished, text):
    (finished / CHECKSUMS).write_text(text)

    with pytest.raises(CheckpointError, match=f"{CHECKSUMS} cannot be read"):
        verified_entries(finished, remedy=REMEDY)
    with pytest.raises(ModelError, match=f"{CHECKSUMS} cannot be read"):
        check_given(finished, "teacher.model")


def test_a_copy_has_checksums_of_its_own_and_no_file_of_a_user(finished, tmp_path):
    (finished / "notes.txt").write_text("mine")
    target = tmp_path / "final"

    def add(folder: Path) -> None:
        (folder / "added").write_text("small")

    changes = {CARD: "new", "tokenizer.json": None, "absent": None}
    copy_finished(finished, target, changes=changes, remedy=REMEDY, add=add)

    assert names(target) == {"model.safetensors", "config.json", CARD, "added", CHECKSUMS}
    assert (target / CARD).read_text() == "new"
    assert verified_entries(target, remedy=REMEDY).keys() == names(target) - {CHECKSUMS}
    assert names(finished) == {*FILES, "notes.txt", CHECKSUMS}


def test_a_file_is_read_once_in_a_process_until_it_is_written_again(finished, monkeypatch):
    read: list[str] = []

    def reading(path: Path) -> str:
        read.append(path.name)
        return real(path)

    real = seals.sha256_of
    monkeypatch.setattr(seals, "sha256_of", reading)
    monkeypatch.setattr(seals, "_SETTLED_NS", 0)
    copy = shutil.copytree(finished, finished.with_name("copy"))
    for _ in range(3):
        verified_entries(copy, remedy=REMEDY)
    assert sorted(read) == ["config.json", "model.safetensors", "tokenizer.json"]

    (copy / "config.json").write_text("{ }")

    assert damage(copy) is not None


READERS = {"from_pretrained", "safe_open", "load_file", "check_weight_files"}


def test_every_file_that_reads_a_model_folder_verifies_the_folder(repository):
    """Files of weights are opened for `check_weight_files`."""
    reading = {
        path.relative_to(repository / "megakd").as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((repository / "megakd").rglob("*.py"))
        if called(path) & READERS and path.name != "weights.py"
    }

    unverified = [name for name, text in reading.items() if "check_given(" not in text]
    # A config or a small copy that was written just before; folders that `resolve_model` and a copy
    # have verified.
    names = ("layers", "cutting", "quantized", "model_folder", "architectures")
    known = {f"models/{name}.py" for name in names}

    assert {"models/loading.py", "data/tokenizers.py"} <= reading.keys()
    assert {*unverified} == known


def called(path: Path) -> set[str]:
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    names = {func.attr for func in calls if isinstance(func, ast.Attribute)}
    return names | {func.id for func in calls if isinstance(func, ast.Name)}
