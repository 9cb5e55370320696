"""Ranks, collectives and start-up: the same under deepspeed, torchrun, srun and plain python."""

from __future__ import annotations

import atexit
import gc
import hashlib
import logging
import os
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
"""Not empty: the group stays until the process ends."""
# In the words of gloo, of the sockets below it, and of NCCL.
_PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The one process that speaks and writes."""
        return self.rank == 0


def start() -> Ranks:
    """Joins the process group of whatever launched this process; alone, it makes its own.

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
    """This process's place in the running group."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    name = _accelerator().device_name(local_rank)
    device = torch.device("cpu" if name.startswith("cpu") else name)
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def supported_dtypes() -> list[torch.dtype]:
    """What this rank's device can compute in."""
    return _accelerator().supported_dtypes()


def _accelerator() -> Any:
    """DeepSpeed's view of the device; imported late, for it looks for hardware at once."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def _init_process_group() -> None:
    if dist.is_initialized():
        return
    # DeepSpeed's groups take torch's default whatever its own timeout says.
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
    """Lets `srun python launch/train.py` start without another launcher.

    Only a step of srun is taken for one: the batch script itself is task 0 of a job too, and a
    plain python there is one process, whatever the job was given.
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
    # One port per job: two jobs on a node must not meet.
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
            f"cannot tell the first host of SLURM_NODELIST={hosts!r} ({error}); set MASTER_ADDR"
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
            f"RANK is set but {', '.join(missing)} not: start with `deepspeed`, `torchrun` or "
            f"`srun`, or unset RANK for one process"
        )


def free_port() -> int:
    """A TCP port that nothing on this host listens to now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _local_world() -> int:
    """Ranks of this host, by torchrun's, DeepSpeed's or Slurm's variable."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
    return next((int(os.environ[n]) for n in names if os.environ.get(n, "").isdigit()), 1)


def _share_cores() -> None:
    local_world = _local_world()
    if "OMP_NUM_THREADS" not in os.environ and local_world > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))


def _put_ninja_on_path() -> None:
    """DeepSpeed compiles with ninja: this python's own, whether it was activated or not.

    Another version of ninja, such as the system's, would compile all anew, and so would this one
    at the next start.
    """
    scripts, path = Path(sys.executable).parent, os.environ.get("PATH", "")
    if (scripts / "ninja").exists() and shutil.which("ninja") != str(scripts / "ninja"):
        os.environ["PATH"] = os.pathsep.join([str(scripts), path])


def use_own_extensions_folder() -> Path:
    """Keeps DeepSpeed's compiled parts in a folder of megakd's own, one per host."""
    # What is compiled depends on the environment's torch, and a home may be shared between hosts.
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    build = f"{socket.gethostname()}-{sys.implementation.cache_tag}-{environment}"
    default = Path.home() / ".cache" / "megakd" / "torch_extensions" / build
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def agree(value: T) -> T:
    """Rank 0's value on every rank: what decides control flow goes through here."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 and gives every rank its result, or every rank its error.

    Raises:
        MegakdError: what rank 0 raised, on all ranks alike, so that none waits for another.
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
    """Runs `action` on rank 0, then on the others, which find what it has built."""
    first: T | None = None

    def run() -> None:
        nonlocal first
        first = action()

    on_main(run)
    return first if dist.get_rank() == 0 else action()  # type: ignore[return-value]


def together(action: Callable[[], T]) -> T:
    """Runs a rank's own, collective-free work; if it fails anywhere, every rank raises.

    Raises:
        MegakdError: the first failing rank's error.
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
    """Every rank's value, by rank."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_(tensor: torch.Tensor, *, largest: bool = False) -> torch.Tensor:
    """Sums (or takes the largest of) `tensor` over the ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor


@contextmanager
def reports_lost_peer() -> Iterator[None]:
    """Turn the failure of a collective whose other end is gone into one line.

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
            f"see what that rank or its launcher says"
        ) from error


def keep_group() -> None:
    """Let the process group outlive a run: DeepSpeed can join only one in a process.

    Later runs of the process use the group; it ends with the process.
    """
    if not _KEPT:
        _KEPT.append(True)
        atexit.register(_leave, failed=True)


def stop(*, failed: bool = False) -> None:
    """Leaves the process group; without this a gloo run aborts at exit.

    Args:
        failed: this rank leaves by an error: the others may not be on their way here.
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
