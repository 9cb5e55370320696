"""Files of a run: written whole or not at all, with checksums, in folders of known names.

Both are written beside their place, synced and renamed. To replace a folder takes two renames: if
the run is killed between them, the next `replaced_folder` puts the old folder back first.

The manifest, `checksums.json`, is written last. `open_finished` (for a folder of a run) and
`check_given` (for a folder that a user names) compare the files with it before any is used. A
record of JSON may carry a checksum of its own.

It is read without torch, so that a command that names something else ends at once.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from safetensors import SafetensorError

from megakd.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MegakdError,
    ModelError,
    suggestion,
)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file; if writing fails, the old file is unchanged."""
    temporary = sibling(path, "new")
    with reports_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, tree: object) -> None:
    """Write `tree` as indented JSON with `write_text`; see `json_text`."""
    write_text(path, json_text(tree, indent=2) + "\n")


def json_text(tree: object, *, indent: int | None = None) -> str:
    """Return strict JSON; a number that is not finite becomes null, as JSON cannot express it."""
    return json.dumps(_finite(tree), indent=indent, ensure_ascii=False, allow_nan=False)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `path` when the body succeeds.

    If the body fails, the temporary folder is removed and `path` is unchanged.
    """
    temporary, aside = sibling(path, "new"), sibling(path, "old")
    with reports_full_disk(path):
        _clean_up(path, temporary, aside)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            sync_tree(temporary)
            if path.exists():
                path.replace(aside)
            temporary.replace(path)
        finally:
            _clean_up(path, temporary, aside)
        _sync(path.parent)


def _clean_up(path: Path, temporary: Path, aside: Path) -> None:
    if aside.exists() and not path.exists():  # failed or killed between the two renames
        aside.replace(path)
    for leftover in (temporary, aside):
        if leftover.exists():
            shutil.rmtree(leftover)


def write_content(path: Path, content: str | bytes) -> None:
    """Write a file inside a temporary folder, without a sync or a rename."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def reports_full_disk(path: Path) -> Iterator[None]:
    """Convert all errors of a full disk into one message; other errors are not changed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = full_disk_reason(error)
        if reason is None:
            raise
        raise MegakdError(
            f"no space left while writing {path} ({reason}); nothing was changed. "
            "Free some space or choose another output_dir, then start the same command again."
        ) from error


def full_disk_reason(error: BaseException) -> str | None:
    """Return the system's text for a full disk, quota or size limit that caused `error`, or None.

    The chain of causes is searched: torch.save into an open file raises a RuntimeError whose
    context is the OSError. safetensors and shutil.copytree have only the number, in their text.
    """
    for link in chain_of(error):
        named = re.search(r"(?:\(os error |\[Errno )(\d+)[)\]]", str(link))
        number = getattr(link, "errno", None) or (int(named[1]) if named else None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return os.strerror(number)
    return None


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of this cause, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def sibling(path: Path, suffix: str) -> Path:
    """Return the hidden path beside a file or folder for what is made of it or guards it."""
    # The name is fixed, not random, so that the next run finds the files of a killed run.
    return path.with_name(f".{path.name}.{suffix}")


def sync_tree(folder: Path) -> None:
    """Wait until all files below a folder, and their names, are on the disk.

    The files get the folder's permissions: safetensors lets only their owner read them.
    """
    readers = folder.stat().st_mode & 0o666
    for path in [*sorted(folder.rglob("*")), folder]:
        if path.is_file() and path.stat().st_mode & 0o777 != readers:
            path.chmod(readers)
        if path.is_file() or path.is_dir():
            _sync(path)


def _sync(path: Path) -> None:
    # Of a folder too: the files may be on disk, and their names in the folder not.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(tree: object) -> object:
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {str(key): _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return tree


def write_tensors(path: Path, state: Any) -> None:
    """Call `torch.save`, and raise the operating system's own error on failure."""
    import torch

    try:
        # Into an open file: if torch opens the file itself, it hides the system's error.
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        system = (link.args for link in chain_of(error) if isinstance(link, OSError))
        raise OSError(*next(system, (str(error).splitlines()[0],))) from error


CHECKSUMS = "checksums.json"

CARD = "README.md"
"""The model card, which users edit."""

# Reading every byte of a cache at each start costs about a second per GiB and rank; in larger
# folders only the lengths of the files are compared.
CHECKED_BYTES = 1 << 30


@contextmanager
def sealed_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `path` and gets a manifest of its files."""
    with replaced_folder(path) as temporary:
        yield temporary
        seal(temporary)


def seal(folder: Path) -> None:
    """Write the manifest of a new folder."""
    write_manifest(folder, entries_of(folder, files_of(folder)))


def write_manifest(folder: Path, files: Entries) -> None:
    """Write the manifest of a new folder whose entries are known."""
    write_json(folder / CHECKSUMS, {"files": files})


def write_finished(path: Path, files: Mapping[str, str | bytes]) -> None:
    """Write a finished folder of small files."""
    with sealed_folder(path) as temporary:
        for name, content in files.items():
            write_content(temporary / name, content)


def copy_finished(
    source: Path,
    target: Path,
    *,
    changes: Mapping[str, str | bytes | None],
    remedy: str,
    add: Callable[[Path], object] | None = None,
) -> None:
    """Verify a finished folder and make `target` a finished folder with the same files.

    Args:
        changes: file name -> content of the file in the copy, or None to leave the file out.
        add: called with the new folder, to write files that belong to the folder.
    """
    listed = open_finished(source, remedy=remedy)
    with sealed_folder(target) as temporary:
        for name in listed.keys() - changes.keys():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, temporary / name)
        for name, content in changes.items():
            if content is not None:
                write_content(temporary / name, content)
        if add is not None:
            add(temporary)


def open_finished(folder: Path, *, remedy: str) -> Entries:
    """Verify a folder that a run has finished, and return the entries of its files.

    The message about a damaged folder ends with the `remedy`.
    """
    reason = damage(folder)
    if reason is not None:
        raise CheckpointError(f"{folder} is damaged: {reason}; {remedy}")
    return entries(folder)


def check_given(folder: Path, where: str, *, wanted: Callable[[str], bool] = bool) -> None:
    """Verify a folder that a user names, if megakd wrote the folder.

    Files may be missing, for example after a transfer through the Hub; a changed file is refused.
    """
    if not (folder / CHECKSUMS).is_file():
        return
    reason = damage(folder, wanted=lambda name: wanted(name) and (folder / name).exists())
    if reason is not None:
        raise ModelError(
            f"{where}: {folder} is damaged: {reason}; copy the folder again, or remove "
            f"{folder / CHECKSUMS} if the file was changed on purpose"
        )


def damage(
    folder: Path, *, wanted: Callable[[str], bool] = bool, most_bytes: float = math.inf
) -> str | None:
    """Return what is wrong with a finished folder, or None; the model card may be edited.

    Of more than `most_bytes`, only the sizes of the files are compared.
    """
    try:
        listed = {n: e for n, e in entries(folder).items() if n != CARD and wanted(n)}
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    size = sum(entry["size"] for entry in listed.values())
    return damage_of(folder, listed, reads=size <= most_bytes)


def users_files(folder: Path) -> list[str]:
    """Return the files of a folder that are not as megakd wrote them."""
    try:
        listed = entries(folder)
    except (OSError, ValueError):
        listed = {}
    names = [name for name in files_of(folder) if name != CHECKSUMS]
    return [n for n in names if n not in listed or damage_of(folder, {n: listed[n]})]


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and the checksum of every file that megakd wrote into a folder.

    Raises:
        OSError: the manifest is missing.
        ValueError: the manifest is damaged.
    """
    try:
        files = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["files"]
        return {name: {"size": e["size"], "sha256": e["sha256"]} for name, e in files.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it lists no files: {error!r}") from error


def whole_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """Reuse the folder if it is whole; otherwise build a temporary folder and rename it.

    Several processes may build at once: the first process to rename wins, and the others use its
    result. A damaged folder is moved away and never changed in place, so that a process that has
    its files memory-mapped keeps reading the same content.
    """

    def is_whole() -> bool:
        return damage(folder, most_bytes=CHECKED_BYTES) is None

    if is_whole():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name[:16]}.", dir=folder.parent
        ) as scratch:
            # A subfolder, because a temporary folder cannot be read by other users.
            draft = Path(scratch) / "draft"
            draft.mkdir()
            build(draft)
            seal(draft)
            sync_tree(draft)
            try:
                if folder.exists() and not is_whole():
                    folder.rename(draft.with_name("damaged"))
                draft.rename(folder)
            except OSError:  # another process was faster
                if not is_whole():
                    raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"cannot write prepared data to {folder.parent}: {reason}. Free space there or make "
            "the folder writable; no partial files were kept"
        ) from error
    return folder


def check_writable(folder: Path, *, where: str) -> None:
    """Check that a folder can be written to, or can be created."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            return
    except OSError as error:  # also of a file, and of a file system without new folders
        raise ConfigError(f"{where}: {there} is not a writable folder") from error


Entries = Mapping[str, Mapping[str, Any]]
"""Mapping from a relative file name to the file's `size` in bytes and `sha256`."""

_CHECKSUM = "checksum"

_SETTLED_NS = 2_000_000_000

Identity = tuple[int, int, int, int, int]

_KNOWN: dict[Identity, str] = {}


def entries_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the entries of some files of a folder."""
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": _known_sha256(folder / name)}
        for name in names
    }


def write_files(folder: Path, contents: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Write files with `torch.save`, and force them to the disk; return their entries."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_tensors(folder / name, content)
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
    return entries_of(folder, contents)


def files_of(folder: Path) -> list[str]:
    """Return the sorted names of all files below a folder, relative to the folder."""
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


def damage_of(folder: Path, entries: Entries, *, reads: bool = True) -> str | None:
    """Return what is wrong with the first damaged file, or None; with `reads`, by its checksum."""
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes, {entry['size']} were written"
        if reads and _known_sha256(path) != entry["sha256"]:
            return f"the checksum of {name} differs"
    return None


def _known_sha256(path: Path) -> str:
    # Each version of a file is read once per process.
    version = version_of(path)
    if version is None:
        return sha256_of(path)
    if version not in _KNOWN:
        _KNOWN[version] = sha256_of(path)
    return _KNOWN[version]


def version_of(path: Path) -> Identity | None:
    """Return numbers that change with the content of a file; None if they may not change in time.

    Every write sets the time of the last change of the inode, which no program can set back. A file
    that was just written may change again without a change of its times.
    """
    facts = path.stat()
    if time.time_ns() - max(facts.st_mtime_ns, facts.st_ctime_ns) < _SETTLED_NS:
        return None
    return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


def write_signed(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON record together with its own checksum, whole or not at all."""
    write_json(path, {**record, _CHECKSUM: _checksum_of(record)})


def read_signed(path: Path) -> dict[str, Any]:
    """Return a record that `write_signed` wrote; raise ValueError if its content differs."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.pop(_CHECKSUM, None) != _checksum_of(record):
        raise ValueError("its checksum differs")
    return record


def _checksum_of(record: Mapping[str, Any]) -> str:
    # Converted to JSON and back first, so that the hash is computed from what a reader will have.
    content = json.loads(json_text(record))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


CONFIG, RUN, REPORT = "config.yaml", "run.json", "report.json"

FINAL, RESULT = "final", "result.json"

FORMAT = 7
"""Increased when records or checkpoints change, so that older ones are refused in one line."""


def read_record(out: Path) -> dict[str, Any] | None:
    """Return the content of run.json; None if the folder holds no run.

    Raises:
        CheckpointError: the run is of another version, or the file is damaged.
    """
    path = out / RUN
    if path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] == FORMAT and record["facts"]:
                return record
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error!r}); restore it, or start over with rm -r "
                f"{quote(str(out))}"
            ) from error
    elif not any(f for of in (f"stages/*/{RESULT}", "checkpoints/*/step-*") for f in out.glob(of)):
        return None
    raise CheckpointError(
        f"{out} holds a run of another version of megakd, which this version cannot go on with; "
        f"use another output_dir, start over with rm -r {quote(str(out))}, or use that version"
    )


def exported_stage(out: Path, stage: str | None) -> Path:
    """Return the folder of a finished stage; None: of the one that became `final/`.

    Raises:
        CheckpointError: there is no such stage, or it has no model.
    """
    stages = out / "stages"
    # Others, such as a scoring, give only scores.
    finished = (path.parent for path in stages.glob(f"*/{RESULT}"))
    models = sorted(folder.name for folder in finished if (folder / "config.json").is_file())
    listed = f"finished stages: {', '.join(models) or 'none'}"
    record = read_record(out) if (out / REPORT).is_file() else None
    name = stage or (record or {}).get("student")
    if name is None:
        raise CheckpointError(
            f"{out} holds no finished run to export; finish the run, or give --stage NAME; {listed}"
        )
    if name not in models:
        near = suggestion(name, (folder.name for folder in stages.glob("*/"))) or ";"
        reason = f'{out} has no stage "{name}"{near}'
        if (stages / name).is_dir():
            has_result = (stages / name / RESULT).is_file()
            problem = "gives no model" if has_result else "has not finished"
            reason = f"stage {name!r} of {out} {problem};"
        raise CheckpointError(f"{reason} {listed}")
    return stages / name


Fingerprint = dict[str, Any]

_ABSENT = object()

_MOST_SHOWN = 5

_BLOCK = 1 << 16

_STRIDE = 1 << 20

_READ_WHOLE = 1 << 28


def flatten(tree: Any, prefix: str = "") -> Fingerprint:
    """Return a nested tree as a flat mapping with dotted keys; list items get their position."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: Fingerprint = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return `key: 3 there, 4 here; …` for the fields that differ, or an empty string."""
    shown = [
        f"{key}: {_shown(there, key)} there, {_shown(here, key)} here"
        for key in dict.fromkeys([*there, *here])
        if there.get(key, _ABSENT) != here.get(key, _ABSENT)
    ]
    if len(shown) > _MOST_SHOWN:
        shown = [*shown[:_MOST_SHOWN], f"and {len(shown) - _MOST_SHOWN} more"]
    return "; ".join(shown)


def _shown(fields: Mapping[str, Any], key: str) -> str:
    return repr(fields[key]) if key in fields else "absent"


def files_identity(files: Iterable[Path]) -> str:
    """Return a hash of the names, sizes and contents of files; large files are sampled.

    Of a file above 256 MiB, 64 KiB of every MiB and the last 64 KiB are read. This is fast for
    models of any size and samples every large matrix, also in the middle of the file: if only some
    layers were trained further, the beginning and the end of the file are unchanged.
    """
    digest = hashlib.sha256()
    for path in files:
        facts = path.stat()
        version = facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns
        digest.update(f"{path.name}:{facts.st_size}:".encode())
        digest.update(_content(path, facts.st_size, version))
    return digest.hexdigest()


@functools.cache
def _content(path: Path, size: int, written: tuple[int, ...]) -> bytes:
    del written  # part of the cache key: a rewritten file is read again
    digest, step = hashlib.sha256(), _BLOCK if size <= _READ_WHOLE else _STRIDE
    with path.open("rb") as file:
        for start in (*range(0, size, step), max(0, size - _BLOCK)):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.digest()
