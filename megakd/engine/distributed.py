"""Ranks, collectives and start-up, for deepspeed, torchrun, srun and plain python alike."""

from __future__ import annotations

import atexit
import gc
import hashlib
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megakd.engine import stale_locks
from megakd.errors import MegakdError, PeerLostError

logger = logging.getLogger(__name__)
T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_KEPT: list[bool] = []
"""Not empty if the process group is kept until the process ends."""
# Parts of error messages of gloo, of its sockets, and of NCCL.
_PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
)


@dataclass(frozen=True)
class Ranks:
    """Rank, world size, local rank and device of this process."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only process that logs and writes shared files."""
        return self.rank == 0


def start() -> Ranks:
    """Join the process group of the launcher, or create a group of one process without launcher.

    Raises:
        MegakdError: the launcher's variables are incomplete.
    """
    adopt_slurm_variables()
    _complete_environment()
    _share_cores()
    _put_ninja_on_path()
    extensions = use_own_extensions_folder()
    if os.environ["LOCAL_RANK"] == "0":
        stale_locks.remove_dead_locks(extensions)
        stale_locks.remove_dead_buffers()
    _init_process_group()
    return ranks()


def ranks() -> Ranks:
    """Return the rank and the device of this process in the initialised process group."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    name = _accelerator().device_name(local_rank)
    device = torch.device("cpu" if name.startswith("cpu") else name)
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def supported_dtypes() -> list[torch.dtype]:
    """Return the dtypes that this rank's device supports."""
    return _accelerator().supported_dtypes()


def _accelerator() -> Any:
    """Return DeepSpeed's accelerator; imported late, because the import searches for hardware."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def _init_process_group() -> None:
    if dist.is_initialized():
        return
    # DeepSpeed's groups use torch's default timeout and ignore the timeout that DeepSpeed is given.
    torch.distributed.distributed_c10d.default_pg_timeout = COLLECTIVE_TIMEOUT
    import deepspeed
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "warning").upper())
    on_cpu = _accelerator().device_name() == "cpu"
    if on_cpu:
        stale_locks.check_shared_memory(_local_world())
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT)
    if on_cpu:
        dist.barrier()
        stale_locks.release_own_buffer()
    else:
        _accelerator().set_device(int(os.environ["LOCAL_RANK"]))


def adopt_slurm_variables() -> None:
    """Set the rank variables from Slurm's, so that `srun python launch/train.py` needs no launcher.

    Only tasks that srun started are treated as ranks. The batch script is task 0 of its job too,
    but a plain python in the batch script is a single process.
    """
    if "RANK" in os.environ or "SLURM_STEP_ID" not in os.environ:
        return
    if os.environ.get("SLURM_NTASKS", "1") == "1":
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_slurm_host()
    # One port per job, so that two jobs on a node do not use the same port.
    port = 20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000
    os.environ.setdefault("MASTER_PORT", str(port))


def _first_slurm_host() -> str:
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "localhost")
    if "[" not in hosts:
        return hosts.split(",")[0]
    try:
        found = subprocess.run(  # noqa: S603 - the program that Slurm itself documents for this
            ["scontrol", "show", "hostnames", hosts],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise MegakdError(
            f"cannot find the first host of SLURM_NODELIST={hosts!r} ({error}); set MASTER_ADDR"
        ) from error
    return found.stdout.split()[0]


def _complete_environment() -> None:
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
        return
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_SIZE", str(_local_world()))
    needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise MegakdError(
            f"RANK is set without {', '.join(missing)}; start with `deepspeed`, `torchrun` or "
            "`srun`, or unset RANK to run one process"
        )


def free_port() -> int:
    """Return a TCP port that is free on this host at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _local_world() -> int:
    """Return the number of ranks of this host, from torchrun's, DeepSpeed's or Slurm's variable."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return _slurm_tasks_of_node() or 1


def _slurm_tasks_of_node() -> int | None:
    """Return the tasks of a step of srun on this node; Slurm lists the nodes as `4(x2),3`."""
    listed = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", listed)
    tasks = [int(count) for count, times in parts for _ in range(int(times or 1))]
    node = os.environ.get("SLURM_NODEID", "")
    if node.isdigit() and int(node) < len(tasks):
        return tasks[int(node)]
    per_node = os.environ.get("SLURM_NTASKS_PER_NODE", "")
    return int(per_node) if per_node.isdigit() else None


def _share_cores() -> None:
    local_world = _local_world()
    if "OMP_NUM_THREADS" not in os.environ and local_world > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))


def _put_ninja_on_path() -> None:
    """Put the ninja of this Python environment first on PATH, for DeepSpeed's compilation.

    With another version of ninja, such as the system's, all extensions would be compiled again,
    and once more at the next start with this ninja.
    """
    scripts, path = Path(sys.executable).parent, os.environ.get("PATH", "")
    if (scripts / "ninja").exists() and shutil.which("ninja") != str(scripts / "ninja"):
        os.environ["PATH"] = os.pathsep.join([str(scripts), path])


def use_own_extensions_folder() -> Path:
    """Set and return the folder for DeepSpeed's compiled extensions, one per host."""
    # Extensions depend on the environment's torch, and hosts may share a home directory.
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    build = f"{socket.gethostname()}-{sys.implementation.cache_tag}-{environment}"
    default = Path.home() / ".cache" / "megakd" / "torch_extensions" / build
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def agree(value: T) -> T:
    """Return rank 0's value on every rank, for values that decide control flow; a collective."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0, and return its result or raise its error on every rank.

    Raises:
        MegakdError: the error of rank 0, on all ranks, so that no rank waits for another rank.
    """
    outcome: tuple[T | None, Exception | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (action(), None)
        except (MegakdError, OSError) as error:
            outcome = (None, error)
    result, error = agree(outcome)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def main_first(action: Callable[[], T]) -> T:
    """Run `action` on rank 0, then on the other ranks, which can reuse the files of rank 0.

    Raises:
        MegakdError: the error of the first rank that failed, on all ranks.
    """
    first: T | None = None

    def run() -> None:
        nonlocal first
        first = action()

    on_main(run)
    return together(lambda: first if dist.get_rank() == 0 else action())  # type: ignore[return-value]


def together(action: Callable[[], T]) -> T:
    """Run `action`, which has no collectives, on every rank; raise on all ranks if one fails.

    Raises:
        MegakdError: the error of the first rank that failed.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except (MegakdError, OSError) as raised:
        error = raised
    errors = gather(error)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise first
    return result  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """Return the values of all ranks, by rank; a collective."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_(tensor: torch.Tensor, *, largest: bool = False) -> torch.Tensor:
    """Reduce `tensor` over the ranks in place: the sum, or the maximum if `largest`."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor


@contextmanager
def reports_lost_peer() -> Iterator[None]:
    """Convert the error of a collective with a rank that has ended into a one-line error.

    Raises:
        PeerLostError: another rank has ended.
    """
    try:
        yield
    except RuntimeError as error:
        reason = next((words for words in _PEER_LOST if words in str(error)), None)
        if reason is None:
            raise
        raise PeerLostError(
            f"rank {os.environ.get('RANK', '0')} ends because another rank has ended ({reason}); "
            "see the output of that rank or of its launcher"
        ) from error


def keep_group() -> None:
    """Keep the process group after a run, because DeepSpeed can join only one group per process.

    Later runs in the same process use the group, which is left when the process ends.
    """
    if not _KEPT:
        _KEPT.append(True)
        atexit.register(_leave, failed=True)


def stop(*, failed: bool = False) -> None:
    """Leave the process group; otherwise a gloo run aborts at exit.

    Args:
        failed: whether this rank leaves because of an error, so that other ranks may not call
            `stop`, and this rank must not wait for them.
    """
    gc.collect()
    if not _KEPT:
        _leave(failed=failed)


def _leave(*, failed: bool) -> None:
    if dist.is_initialized():
        if not failed:
            with reports_lost_peer():
                dist.barrier()
        dist.destroy_process_group()
