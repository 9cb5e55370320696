"""Files of hidden states that a server writes and a rank reads: waited for, read, deleted.

vLLM states the path of a file before the file is complete. It holds an exclusive lock on a second
file, `<path>.lock`, until the file is complete (`ExampleHiddenStatesConnector` of vLLM in
vllm/distributed/kv_transfer/kv_connector/v1/example_hidden_states_connector.py).
"""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file

from megakd.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

SEEN_WITHIN_S = 30.0
"""Seconds until a file that a server has written on one node is visible on another node."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.25


class _NotYet(NamedTuple):
    """A file that cannot be read yet: the reason, and whether the server still writes it."""

    reason: str
    is_written: bool


def read_state_file(
    file: Path, *, time_limit_s: float, check_server: Callable[[], None]
) -> dict[str, Tensor]:
    """Wait until the server has written a file, and return its tensors.

    Args:
        file: a safetensors file, with the lock of the server beside it.
        time_limit_s: seconds to wait while the server holds the lock.
        check_server: function that raises if the server has ended; called while nobody writes.

    Raises:
        ServerError: the file or its lock is missing, the file is damaged or cut short, the lock is
            held for too long, or the server has ended.
    """
    began, pause, last_written = time.monotonic(), _FIRST_PAUSE_S, time.monotonic()
    while True:
        found = _attempt(file)
        if not isinstance(found, _NotYet):
            return found
        now = time.monotonic()
        last_written = now if found.is_written else last_written
        if now - began > time_limit_s or now - last_written > SEEN_WITHIN_S:
            raise ServerError(
                f"teacher.server.states: {found.reason}, {now - began:.0f} s after a server has "
                f"named {file.name}; check that teacher.server.states and shared_storage_path of "
                "the server are one folder with room for the files, and that the server has not "
                "set use_synchronization_lock to false"
            )
        if pause == _LONGEST_PAUSE_S and not found.is_written:
            check_server()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _attempt(file: Path) -> dict[str, Tensor] | _NotYet:
    lock = lock_of(file)
    try:
        with lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # A copy: the file is deleted, and a mapped file would stay in /dev/shm.
            return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except BlockingIOError:
        return _NotYet(f"{file} is still being written", is_written=True)
    except FileNotFoundError:
        missing = file if lock.exists() else lock
        return _NotYet(f"{missing} does not exist", is_written=False)
    except SafetensorError as error:
        return _NotYet(f"{file} is damaged or cut short ({error})", is_written=False)
    except OSError as error:
        raise ServerError(
            f"teacher.server.states: {file} cannot be read ({error}); use a folder of a file "
            "system with locks whose files every rank can read"
        ) from error


def lock_of(file: Path) -> Path:
    """Return the file that the server locks while it writes `file`."""
    return file.with_name(f"{file.name}.lock")


def remove_state_files(files: Iterable[Path]) -> None:
    """Delete files; missing files are no error.

    Raises:
        ServerError: a file cannot be deleted.
    """
    try:
        for file in files:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise ServerError(
            f"teacher.server.states: {error.filename} was read and cannot be deleted "
            f"({error.strerror}); start the server and the run as one user"
        ) from error


def check_folder(folder: Path, key: str, wanted: str, *, is_made: bool = False) -> None:
    """Check that this rank may write and delete files in a folder.

    Args:
        folder: the folder that `key` of the config names.
        key: the key.
        wanted: what the key must name.
        is_made: whether a missing folder is made.

    Raises:
        ServerError: the folder is missing or cannot be written.
    """
    probe = folder / f"megakd-probe-{time.time_ns()}"
    try:
        if is_made:
            folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ServerError(
            f"{key}: {folder} cannot be written ({error.strerror}); name {wanted}"
        ) from error
