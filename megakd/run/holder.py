"""Lock that allows one run at a time in an output folder.

`lock.json` names the run that holds the folder: host, process and start time. The file is created
by a hard link, which fails if the name exists, also on network storage. A holder that was killed
leaves the file behind, and the next run takes the folder over: at once if the dead process was on
this host, else after `DEAD_AFTER_S` without a sign of life. A living holder gives a sign every
`BEAT_S`.

Two runs may find the same holder dead at the same time. Therefore a run claims the place of a dead
holder with a file that is named after that holder. Only one run can create this file. The lease of
`filelock` takes a dead holder over by an exchange of two names, which NFS refuses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from megakd.engine.collectives import gather, node_name, on_main
from megakd.errors import CheckpointError, ConfigError, InUseError
from megakd.storage.folders import LOCK

logger = logging.getLogger(__name__)
BEAT_S = 10.0
# Network storage may show a change of another host only after a minute.
DEAD_AFTER_S = 90.0
LOOK_EVERY_S = 1.0
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)


@dataclass(frozen=True)
class Holder:
    """The process that holds an output folder.

    place: host, boot and process namespace, within which the process number is valid.
    start: the start of the process, which distinguishes processes with the same number.
    """

    host: str
    pid: int
    since: str
    place: str
    start: str
    key: str


def this_process() -> Holder:
    """Return the holder that describes this process."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    start = process_start(os.getpid()) or ""
    place = [host := socket.gethostname()]
    with contextlib.suppress(OSError):  # systems other than Linux have no such files
        place.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        place.append(str(Path("/proc/self/ns/pid").readlink()))
    return Holder(host, os.getpid(), since, " ".join(place), start, uuid.uuid4().hex)


def process_start(pid: int) -> str | None:
    """Return the start time of a process; None if the process does not run."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        started = process.create_time()
    except psutil.NoSuchProcess:
        return None
    # In ticks since the boot if available: setting the clock does not change the ticks.
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return f"{started:.2f}"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold an output folder on rank 0 while the body runs; a collective, also in its errors."""
    lock = FolderLock(folder)
    holder = on_main(lock.take)
    try:
        _check_shared(folder / LOCK, holder)
        yield
    finally:
        if holder == lock.holder:
            lock.release()


@contextmanager
def written_once(folder: Path) -> Iterator[None]:
    """Hold a folder that another process may write at the same time, on one rank."""
    lock = FolderLock(folder)
    lock.take()
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # also of a process that was killed
            folder.rmdir()


def _check_shared(path: Path, holder: Holder) -> None:
    blind = ""
    for look in range(round(DEAD_AFTER_S / LOOK_EVERY_S)):
        place = f"{path.absolute()} on {node_name()}"
        places = gather(None if read_holder(path) == holder else place)
        blind = ", ".join(dict.fromkeys(place for place in places if place))
        if not blind:
            return
        if look == 0:
            logger.warning("what rank 0 has written is not visible yet as %s: waiting", blind)
        time.sleep(LOOK_EVERY_S)
    raise ConfigError(
        f"output_dir: {LOCK}, which rank 0 wrote on {holder.host}, is not visible as {blind}; all "
        "nodes must share output_dir: name a folder on shared storage"
    )


class FolderLock:
    """The lock of one folder, for one process.

    `lost` is called, in a thread, if another run takes the lock while this holder is alive.
    """

    def __init__(self, folder: Path, lost: Callable[[Path], None] | None = None) -> None:
        self.path = folder / LOCK
        self.holder = this_process()
        self._lost = lost or _end_at_once
        self._is_new = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._give_signs, name="lock", daemon=True)

    def take(self) -> Holder:
        """Take the lock of the folder; raise InUseError if another run holds the folder."""
        try:
            self._is_new = not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._try():
                pass
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}") from error
        self._thread.start()
        return self.holder

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        if read_holder(self.path) == self.holder:
            self.path.unlink(missing_ok=True)
            if self._is_new:  # a run that was refused before its start leaves nothing behind
                with contextlib.suppress(OSError):
                    self.path.parent.rmdir()

    def _try(self) -> bool:
        if self._create(self.path):
            return True
        last, path = self._last()
        if last is None:
            return False
        is_dead = self._is_dead(last, path)
        if self._last()[0] != last:
            return False
        if not is_dead:
            raise InUseError(
                f"{self.path.parent} is in use by another run: process {last.pid} on {last.host}, "
                f"since {last.since}; wait until that run ends, stop it, or use another "
                f"folder. If that process is not a run of this folder, remove {self.path}"
            )
        claim = self._claim_on(last)
        if not self._create(claim):
            return False
        # Between the check and the claim, another run may have started and ended.
        is_ours = self._last()[0] == self.holder
        if is_ours:
            self._write(self._draft)
            self._draft.replace(self.path)
        claim.unlink(missing_ok=True)
        return is_ours

    def _last(self) -> tuple[Holder | None, Path]:
        path = self.path
        last = read_holder(path)
        while last is not None:
            claim = self._claim_on(last)
            following = read_holder(claim)
            if following is None:
                break
            last, path = following, claim
        return last, path

    def _claim_on(self, holder: Holder) -> Path:
        return self.path.with_name(f".{LOCK}.after-{holder.key}")

    @property
    def _draft(self) -> Path:
        return self.path.with_name(f".{LOCK}.{self.holder.key}")

    def _write(self, path: Path, mode: str = "w") -> None:
        with path.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(self.holder), indent=2) + "\n")

    def _create(self, path: Path) -> bool:
        try:
            self._write(self._draft)
            try:
                os.link(self._draft, path)
            except OSError as error:
                if error.errno not in NO_HARD_LINKS:
                    raise
                self._write(path, "x")  # a reader may see a partial file
        except FileExistsError:
            # Network storage repeats a call whose answer was lost: the link may be this process's.
            return read_holder(path) == self.holder
        finally:
            self._draft.unlink(missing_ok=True)
        return True

    def _is_dead(self, holder: Holder, path: Path) -> bool:
        if holder.place == self.holder.place:
            try:
                return process_start(holder.pid) != holder.start
            except psutil.AccessDenied:  # a process of another user
                return False
        logger.warning(
            "%s names process %d on %s, which cannot be seen from this host: waiting up to %.0f s "
            "for a change of the file",
            *(path, holder.pid, holder.host, DEAD_AFTER_S),
        )
        first, deadline = _changed_at(path), time.monotonic() + DEAD_AFTER_S
        while time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)
            if _changed_at(path) != first:
                return False
        return True

    def _give_signs(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                if read_holder(self.path) != self.holder and not self._create(self.path):
                    self._lost(self.path)
                    return
                os.utime(self.path)
            except OSError as error:  # the storage may work again at the next sign
                logger.warning(
                    "the modification time of %s could not be updated: %s", self.path, error
                )


def read_holder(path: Path) -> Holder | None:
    """Return the holder that a lock names; None if there is no lock."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # a partial file of a holder that may still be writing
        return Holder("an unknown host", 0, "an unknown time", "", "", "unreadable")


def _changed_at(path: Path) -> int | None:
    # Network storage reports the time of the last change only for an open file.
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _end_at_once(path: Path) -> None:
    os.write(2, f"megakd: error: another run has taken {path}; this run ends\n".encode())
    os._exit(2)
