"""Lock that allows one run at a time in a folder: `lock.json` names the process that holds it.

The process holds a lock of the file system on the file, which ends with the process however it
ends: what it leaves behind, the next run of this host takes over. Whether a process of another host
still runs cannot be seen: its file is an error that names the file.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from megakd.errors import CheckpointError, ConfigError, InUseError

LOCK, VISIBLE_WITHIN_S = "lock.json", 90
"""Network storage may show a file of another host only after a minute."""


@contextmanager
def locked_on_main(folder: Path) -> Iterator[None]:
    """Hold an output folder on rank 0 while the body runs; a collective, also in its errors."""
    from megakd.engine.collectives import gather, node_name, on_main  # torch takes seconds

    path, blind = folder / LOCK, list[str]()
    with ExitStack() as lock:
        text = on_main(lambda: lock.enter_context(locked(folder)))
        for _ in range(VISIBLE_WITHIN_S):
            place = f"{path.absolute()} on {node_name()}"
            sees = path.exists() and path.read_text(encoding="utf-8") == text
            blind = [one for one in gather(None if sees else place) if one]
            if not blind:
                break
            time.sleep(1.0)
        else:
            raise ConfigError(
                f"output_dir: {LOCK}, which rank 0 wrote, is not visible as "
                f"{', '.join(dict.fromkeys(blind))}; all nodes must share output_dir: name a "
                "folder on shared storage"
            )
        yield


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Hold a folder, which is created, while the body runs; yield the text of its lock.

    Raises:
        InUseError: another process holds the folder.
        CheckpointError: the lock cannot be written.
    """
    path, is_new = folder / LOCK, not folder.exists()
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T %Z")}
    text = json.dumps(facts)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+", encoding="utf-8"))
            _take(file, folder, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(text)
            file.flush()
        except OSError as error:
            check_free(folder)  # another user may hold it
            raise CheckpointError(f"{path} cannot be written: {error}") from error
        try:
            yield text
        finally:
            path.unlink(missing_ok=True)
            stack.close()
            if is_new:  # a run that was refused before its start leaves nothing behind
                with suppress(OSError):
                    folder.rmdir()


def check_free(folder: Path) -> None:
    """Raise InUseError if a process that may still run holds a folder."""
    with (
        suppress(FileNotFoundError, NotADirectoryError),
        (folder / LOCK).open(encoding="utf-8") as file,
    ):
        _take(file, folder, fcntl.LOCK_SH)


def _take(file: TextIO, folder: Path, kind: int) -> None:
    """Lock the file of a folder; raise InUseError if a process that may still run holds it."""
    file.seek(0)
    text = file.read()
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        is_free = os.fstat(file.fileno()).st_nlink > 0  # else its holder has ended just now
    except BlockingIOError:
        is_free = False
    except OSError:  # of storage without such locks
        is_free = not text
    facts = {"host": "an unknown host", "pid": 0, "since": "an unknown time"}
    with suppress(ValueError):  # another start is writing it
        facts = json.loads(text)
    if is_free and (not text or facts["host"] == socket.gethostname()):
        return
    raise InUseError(
        f"{folder} is in use by another run: process {facts['pid']} on {facts['host']}, since "
        f"{facts['since']}; wait until that run ends, stop it, or use another folder. If that "
        f"process is not a run of this folder, remove {folder / LOCK}"
    )
