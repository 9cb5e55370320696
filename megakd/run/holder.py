"""Lock that allows one run at a time in a folder: `lock.json` names the process that holds it.

A process of this host that has ended leaves a lock that the next run takes over. Whether a process
of another host or container still runs cannot be seen: its lock is an error that names the file.
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

from megakd.errors import CheckpointError, ConfigError, InUseError

LOCK, VISIBLE_WITHIN_S = "lock.json", 90
"""Network storage may show a file of another host only after a minute."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold an output folder on rank 0 while the body runs; a collective, also in its errors."""
    from megakd.engine.collectives import gather, node_name, on_main  # torch takes seconds

    path, blind = folder / LOCK, list[str]()
    with ExitStack() as lock:
        text = on_main(lambda: lock.enter_context(written_once(folder)))
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
def written_once(folder: Path) -> Iterator[str]:
    """Hold a folder, which is created, while the body runs; yield the text of its lock.

    Raises:
        InUseError: another process holds the folder.
        CheckpointError: the lock cannot be written.
    """
    path, is_new, pid = folder / LOCK, not folder.exists(), os.getpid()
    facts = {"host": socket.gethostname(), "pid": pid, "since": time.strftime("%F %T %Z")}
    text = json.dumps(facts | {"place": _place(), "start": _start(pid)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder):
            if path.exists():
                check_free(folder)
                path.unlink(missing_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        if path.exists():  # another start was faster
            check_free(folder)
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    try:
        yield text
    finally:
        path.unlink(missing_ok=True)
        if is_new:  # a run that was refused before its start leaves nothing behind
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let starts of this host wait for each other, so that one alone takes over a dead lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of storage without such locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_free(folder: Path) -> None:
    """Raise InUseError if a process that may still run holds a folder."""
    path = folder / LOCK
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError:  # another start is writing it
        facts = {"host": "an unknown host", "pid": 0, "since": "an unknown time"}
    if facts.get("place") == _place() and facts["start"] != _start(facts["pid"]):
        return
    raise InUseError(
        f"{folder} is in use by another run: process {facts['pid']} on {facts['host']}, since "
        f"{facts['since']}; wait until that run ends, stop it, or use another folder. If that "
        f"process is not a run of this folder, remove {path}"
    )


def _place() -> str:
    """Return where the number of a process is valid: its host, or its container."""
    # A pod that is started again has the name of the one before, which has ended.
    is_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    namespace = "pod" if is_pod else str(Path("/proc/self/ns/pid").readlink())
    return f"{socket.gethostname()} {namespace}"


def _start(pid: int) -> str | None:
    """Return when a process began, in ticks since the boot; None if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else fields[18]
