"""Killed or out of space at any moment, a path holds the old content or the new one."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megakd.errors import MegakdError
from megakd.process.files import (
    json_text,
    replaced_folder,
    reports_full_disk,
    write_json,
    write_text,
)
from megakd.process.seals import copy_finished, sealed_folder


def folder_with(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "content.txt").write_text(text)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_file_is_replaced_unless_the_write_fails_and_nothing_else_is_left(
    tmp_path, monkeypatch
):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "first")
    write_text(path, "sécond")
    assert path.read_text(encoding="utf-8") == "sécond"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MegakdError, match=r"no space left while writing .*file\.txt.*No space"):
        write_text(path, "third")

    assert path.read_text(encoding="utf-8") == "sécond"
    assert names(path.parent) == ["file.txt"]


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1.5, float("inf")], "c": (1, "é")})

    tree = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))

    assert tree == {"a": None, "b": [1.5, None], "c": [1, "é"]}
    assert json_text({"a": 1, "b": "x\ny"}) == '{"a": 1, "b": "x\\ny"}'  # on one line


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_of_a_folder_are_read_by_those_who_may_read_new_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with sealed_folder(tmp_path / "final") as folder:
            save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    finally:
        os.umask(before)

    files = (tmp_path / "final").iterdir()
    assert {file.stat().st_mode & 0o777 for file in files} == {mode}


@pytest.mark.parametrize("fails", ["the body", "the last rename"])
def test_a_failure_leaves_the_old_folder(tmp_path, monkeypatch, fails):
    path, replace = folder_with(tmp_path / "final", "old"), Path.replace

    def refuse_the_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".new") and fails == "the last rename":
            raise PermissionError(errno.EACCES, "refused")
        return replace(self, target)

    def write() -> None:
        with replaced_folder(path) as folder:
            (folder / "content.txt").write_text("new")
            if fails == "the body":
                raise PermissionError(errno.EACCES, "refused")

    monkeypatch.setattr(Path, "replace", refuse_the_new)
    with pytest.raises(PermissionError):
        write()

    assert (path / "content.txt").read_text() == "old"
    assert names(tmp_path) == ["final"]


@pytest.mark.parametrize("call", ["temporary.replace", "path.replace", "fsync", "rmtree"])
def test_a_process_killed_anywhere_leaves_old_or_new(tmp_path, call):
    path = folder_with(tmp_path / "final", "old")
    rename, process = Path.replace, os.fork()
    if not process:

        def die(*_: object, **__: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def rename_or_die(self: Path, target: Path) -> object:
            dies = self.name == (".final.new" if call == "temporary.replace" else "final")
            return die() if dies and call != "rmtree" else rename(self, target)

        if call == "fsync":
            os.fsync = die
        elif call == "rmtree":
            shutil.rmtree = die
        else:
            Path.replace = rename_or_die
        try:
            with replaced_folder(path) as folder:
                (folder / "content.txt").write_text("new")
        finally:
            os._exit(0)

    _, status = os.waitpid(process, 0)
    with pytest.raises(KeyError), replaced_folder(path):  # the next write
        raise KeyError

    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (path / "content.txt").read_text() == ("new" if call == "rmtree" else "old")
    assert names(tmp_path) == ["final"]


def write_weights(path: Path) -> None:
    with replaced_folder(path) as folder:
        save_file({"a": torch.zeros(50_000)}, folder / "model.safetensors")


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "x" * 200_000),
    "weights": write_weights,
    "copy": lambda path: copy_finished(path.parents[1] / "source", path, changes={}, remedy=""),
}


def said_by_writers(folder: Path) -> dict[str, str]:
    """What each writer says of a limit on the size of files."""
    answer: dict[str, str] = {}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    for name, write in WRITERS.items():
        (folder / name).mkdir()
        try:
            write(folder / name / "target")
        except MegakdError as error:
            answer[name] = str(error)
    return answer


def test_a_size_limit_is_reported_as_no_space(tmp_path):
    with sealed_folder(tmp_path / "source") as made:
        (made / "weights").write_bytes(bytes(200_000))
    reading, writing = os.pipe()
    if not (process := os.fork()):
        try:
            os.write(writing, json.dumps(said_by_writers(tmp_path)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as answer:
        answers = json.loads(answer.read())
    os.waitpid(process, 0)

    assert answers.keys() == WRITERS.keys()
    for writer, said in answers.items():
        assert "no space left while writing" in said, writer
        assert "nothing was changed" in said, writer
        assert names(tmp_path / writer) == []


def test_other_errors_keep_their_type(tmp_path):
    with pytest.raises(SafetensorError, match="header"), reports_full_disk(tmp_path):
        raise SafetensorError("header too small")
    with pytest.raises(OSError, match="refused"), reports_full_disk(tmp_path):
        raise OSError(errno.EACCES, "refused")
