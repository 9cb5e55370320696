"""Killed or out of space at any moment, a path holds the old content or the new one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megakd.errors import MegakdError
from megakd.storage import atomic
from megakd.storage.atomic import (
    json_text,
    recover,
    replaced_folder,
    reports_full_disk,
    sha256_of,
    write_json,
    write_text,
)


def folder_with(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "content.txt").write_text(text)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "file.txt"

    write_text(path, "first")
    write_text(path, "sécond")

    assert path.read_text(encoding="utf-8") == "sécond"
    assert names(path.parent) == ["file.txt"]


def test_a_failed_text_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MegakdError, match=r"no space left while writing .*file\.txt.*No space"):
        write_text(path, "new")

    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1.5, float("inf")], "c": (1, "é")})

    tree = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))

    assert tree == {"a": None, "b": [1.5, None], "c": [1, "é"]}
    assert json_text({"a": 1, "b": "x\ny"}) == '{"a": 1, "b": "x\\ny"}'  # on one line


def test_a_folder_is_replaced_whole(tmp_path):
    path = folder_with(tmp_path / "final", "old")

    with replaced_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "other.txt").write_text("new")
        assert (path / "content.txt").read_text() == "old"

    assert names(path) == ["sub"]
    assert names(tmp_path) == ["final"]


def test_a_failure_in_the_body_leaves_the_old_folder(tmp_path):
    path = folder_with(tmp_path / "final", "old")

    def fail_half_way() -> None:
        with replaced_folder(path) as folder:
            (folder / "content.txt").write_text("new")
            (folder / "missing.txt").read_text()

    with pytest.raises(FileNotFoundError):
        fail_half_way()

    assert (path / "content.txt").read_text() == "old"
    assert names(tmp_path) == ["final"]


def test_a_failure_of_the_last_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    path = folder_with(tmp_path / "final", "old")
    rename = Path.replace

    def refuse_the_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise PermissionError(errno.EACCES, "refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refuse_the_new)
    with pytest.raises(PermissionError), replaced_folder(path) as folder:
        (folder / "content.txt").write_text("new")

    assert (path / "content.txt").read_text() == "old"
    assert names(tmp_path) == ["final"]


@pytest.mark.parametrize(("left", "whole"), [(".final.new", "old"), ("final", "new")])
def test_recover_undoes_a_first_rename_and_keeps_what_both_have_made(tmp_path, left, whole):
    folder_with(tmp_path / ".final.old", "old")
    folder_with(tmp_path / left, "new")

    restored = recover(tmp_path / "final")

    assert restored == (whole == "old")
    assert (tmp_path / "final" / "content.txt").read_text() == whole
    assert names(tmp_path) == ["final"]


@pytest.mark.parametrize("call", ["temporary.replace", "path.replace", "fsync", "rmtree"])
def test_a_process_killed_anywhere_leaves_old_or_new(tmp_path, call):
    path = folder_with(tmp_path / "final", "old")
    program = f"""
import os, shutil, signal
from pathlib import Path
from megakd.storage.atomic import replaced_folder
def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
rename = Path.replace
def rename_or_die(self, target):
    dies = self.name == (".final.new" if {call!r} == "temporary.replace" else "final")
    return die() if dies and {call!r} != "rmtree" else rename(self, target)
if {call!r} == "fsync": os.fsync = die
elif {call!r} == "rmtree": shutil.rmtree = die
else: Path.replace = rename_or_die
with replaced_folder(Path({str(path)!r})) as folder:
    (folder / "content.txt").write_text("new")
"""

    run = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    recover(path)

    assert run.returncode == -signal.SIGKILL
    assert (path / "content.txt").read_text() == ("new" if call == "rmtree" else "old")
    assert names(tmp_path) == ["final"]


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from megakd.storage.atomic import replaced_folder, write_text
from megakd.errors import MegakdError
from megakd.storage.folders import copy_finished, sealed_folder
def text(path): write_text(path, "x" * 200_000)
def weights(path):
    with replaced_folder(path) as folder:
        save_file({"a": torch.zeros(50_000)}, folder / "model.safetensors")
def pickle(path):
    with replaced_folder(path) as folder, (folder / "a.pt").open("wb") as file:
        torch.save({"a": torch.zeros(50_000)}, file)
def copy(path):
    copy_finished(source, path, changes={}, remedy="")
root, said = Path(sys.argv[1]), {}
source = root / "source"
with sealed_folder(source) as made: (made / "weights").write_bytes(bytes(200_000))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for writer in (text, weights, pickle, copy):
    folder = root / writer.__name__
    folder.mkdir()
    try: writer(folder / "target")
    except MegakdError as error: said[writer.__name__] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder where a process with a size limit has tried all writers, and what each said."""
    folder = tmp_path_factory.mktemp("limited")
    command = [sys.executable, "-W", "ignore", "-c", LIMITED, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    return folder, json.loads(run.stdout)


@pytest.mark.parametrize("writer", ["text", "weights", "pickle", "copy"])
def test_a_size_limit_is_reported_as_no_space(limited, writer):
    folder, said = limited

    assert "no space left while writing" in said[writer]
    assert "nothing was changed" in said[writer]
    assert names(folder / writer) == []


def test_other_errors_keep_their_type(tmp_path):
    with pytest.raises(SafetensorError, match="header"), reports_full_disk(tmp_path):
        raise SafetensorError("header too small")


def test_the_digest_is_the_files(tmp_path):
    save_file({"a": torch.arange(5)}, tmp_path / "a")

    assert sha256_of(tmp_path / "a") == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


def test_an_error_of_another_number_is_no_full_disk():
    assert atomic.full_disk_reason(OSError(errno.EACCES, "refused")) is None
