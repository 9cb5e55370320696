"""Ranks and start-up, for deepspeed, torchrun, srun and plain python alike, and groups of nodes.

A teacher that is sharded within nodes has one whole copy per node, so that no weight is gathered
from another node. DeepSpeed gets the group with each parameter, from `zero.Init`: an `mpu` would
change the group of every engine of the process, the student's included.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from megakd.config.deepspeed import load_ds_config, shards_within_node
from megakd.engine.collectives import all_reduce_, backend_for, gather, node_name, reports_lost_peer
from megakd.errors import ConfigError, MegakdError, suggestion

if TYPE_CHECKING:
    from megakd.config.run import RunConfig

logger = logging.getLogger(__name__)
TORCHRUN = "TORCHELASTIC_RUN_ID"
CONNECT = timedelta(seconds=20)
_KEPT: list[bool] = []
"""Not empty if the process group is kept until the process ends."""


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


def start(*, collective_timeout_s: float = 600.0) -> Ranks:
    """Join the process group of the launcher, or create a group of one process without launcher."""
    adopt_slurm_variables()
    _complete_environment()
    _share_cores()
    _put_ninja_on_path()
    extensions = use_own_extensions_folder()
    if os.environ["LOCAL_RANK"] == "0":
        remove_dead_locks(extensions)
    with reports_lost_peer():
        _init_process_group(timedelta(seconds=collective_timeout_s))
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


def _init_process_group(timeout: timedelta) -> None:
    if dist.is_initialized():
        _set_timeout(timeout)  # of the group of an earlier run in this process
        return
    # DeepSpeed's groups use torch's default timeout and ignore the timeout that DeepSpeed is given.
    distributed_c10d.default_pg_timeout = timeout
    import deepspeed
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "warning").upper())
    accelerator = _accelerator()
    device = accelerator.device_name()
    if device == "cpu":
        # In DeepSpeed's shared memory, which only its tensor parallelism uses, ranks wait for each
        # other without a limit, and no thread can end them, because DeepSpeed keeps the
        # interpreter's lock meanwhile.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = backend_for(device, accelerator.communication_backend_name())
    _join(backend, device, timeout=timeout)
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout
    )
    # With the limit of a step: the group for objects waits hours for a rank that never joins.
    all_reduce_(torch.ones(1))
    if device != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        # What stays fp32 is multiplied in TF32 on tensor cores.
        torch.set_float32_matmul_precision("high")


def _join(backend: str, device: str, *, timeout: timedelta) -> None:
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    # Without a rendezvous backend, torchrun keeps its store when it restarts ranks, with the
    # addresses of those that have ended, and torch would read those.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed_c10d.PrefixStore(f"megakd/attempt-{attempt}", store)
    store.set(f"started/{rank}", "")
    store.wait([f"started/{other}" for other in range(world)], timeout)
    # As DeepSpeed does: NCCL connects at once, and knows the GPU of this rank.
    bound = device == "cuda" and world > 1
    # Gloo tries an address that does not connect the nodes for several times its limit.
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=min(timeout, CONNECT),
        device_id=torch.device(device, int(os.environ["LOCAL_RANK"])) if bound else None,
    )  # fmt: skip
    _set_timeout(timeout)


def _set_timeout(timeout: timedelta) -> None:
    public = getattr(dist, "set_timeout", None)  # since torch 2.14
    (public or distributed_c10d._set_pg_timeout)(timeout)  # noqa: SLF001


def adopt_slurm_variables() -> None:
    """Set the rank variables from Slurm's, so that `srun python launch/train.py` needs no launcher.

    Only tasks that srun started are treated as ranks. The batch script is task 0 of its job too,
    but a plain python in the batch script is a single process.
    """
    is_task = "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"
    if "RANK" in os.environ or not is_task:
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_slurm_host()
    # One port per step of a job, so that two jobs or steps on a node do not use the same port.
    job, step = os.environ.get("SLURM_JOB_ID", "0"), os.environ["SLURM_STEP_ID"]
    os.environ.setdefault("MASTER_PORT", str(20000 + (int(job) + 4001 * int(step)) % 20000))


def _first_slurm_host() -> str:
    hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "localhost")
    if "[" not in hosts:
        return hosts.split(",")[0]
    try:
        shown = subprocess.run(  # noqa: S603 - the program that Slurm itself documents for this
            ["scontrol", "show", "hostnames", hosts],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise MegakdError(
            f"cannot find the first host of SLURM_NODELIST={hosts!r} ({error}); set MASTER_ADDR"
        ) from error
    return shown.stdout.split()[0]


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
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return _slurm_tasks_of_node() or 1


def _slurm_tasks_of_node() -> int | None:
    # Slurm lists the tasks of a step on its nodes as `4(x2),3`.
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
    threads = os.environ.get("OMP_NUM_THREADS")
    # torchrun sets 1 where the user sets nothing, which leaves the optimizer on the CPU one core.
    by_torchrun = threads == "1" and TORCHRUN in os.environ
    if local_world == 1 or not (threads is None or by_torchrun):
        return
    # The cores that the process may use, not those of the host. srun gives each task its own
    # cores; other launchers, also inside a task of srun, give all ranks the same cores.
    allowed = len(os.sched_getaffinity(0))
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    is_task = per_task.isdigit() and os.environ.keys().isdisjoint(("CROSS_RANK", TORCHRUN))
    cores = min(allowed, int(per_task)) if is_task else allowed // local_world
    torch.set_num_threads(max(1, cores))


def _put_ninja_on_path() -> None:
    # With another version of ninja, such as the system's, DeepSpeed would compile all extensions
    # again, and once more at the next start with the ninja of this Python environment.
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


def remove_dead_locks(folder: Path) -> list[Path]:
    """Remove and return build locks that no process of this host holds open; log each of them.

    Every later start would wait silently for the lock of a rank that was killed. A lock in use, or
    younger than this process, is not touched: its owner would fail if it did not find the file.
    """
    began = psutil.Process().create_time()
    old = [path for path in folder.glob("**/lock") if _changed_at(path) < began]
    used = set(_files_in_use()) if old else set[str]()
    dead = [path for path in old if str(path.resolve()) not in used and _changed_at(path) < began]
    for lock in dead:
        lock.unlink(missing_ok=True)
        logger.warning("removed the lock %s of a process that was killed", lock)
    return dead


def _changed_at(path: Path) -> float:
    """Return the time of the last change of a file; infinity if it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _files_in_use() -> Iterator[str]:
    for process in psutil.process_iter():
        try:
            yield from (file.path for file in process.open_files())
        except (psutil.Error, OSError):
            continue  # the process has ended, or belongs to another user and has no file of ours


def keep_group() -> None:
    """Keep the process group after a run, because DeepSpeed can join only one group per process.

    Later runs in the same process use the group, which is left when the process ends.
    """
    if not _KEPT:
        _KEPT.append(True)
        atexit.register(_leave_at_exit)


def stop(*, failure: BaseException | None = None) -> None:
    """Leave the process group; otherwise a gloo run aborts at exit.

    After a failure of this rank, other ranks may not call `stop`, and this rank must not wait for
    them.
    """
    gc.collect()
    if _KEPT or not dist.is_initialized():
        return
    if failure is not None and _leaving_waits():
        # After the error is printed.
        atexit.register(_end, getattr(failure, "exit_code", 1))
        return
    if failure is None:
        with reports_lost_peer():
            dist.barrier()
    dist.destroy_process_group()


def _leave_at_exit() -> None:
    if dist.is_initialized():
        if getattr(sys, "last_value", None) is not None and _leaving_waits():
            _end(1)
        dist.destroy_process_group()


def _leaving_waits() -> bool:
    """Return whether leaving may wait for ranks in a collective; only gloo's groups do not."""
    return any(not part.endswith("gloo") for part in dist.get_backend_config().split(","))


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_NODE_GROUPS: dict[dist.ProcessGroup, dist.ProcessGroup | None] = {}
"""The group of this rank's node, by the default group; None if there is one node."""


def node_group() -> dist.ProcessGroup | None:
    """Return the process group of this rank's node; None for a single node.

    The first call is a collective.
    """
    world = dist.group.WORLD
    if world is None:
        return None
    if world not in _NODE_GROUPS:
        nodes = ranks_by_node(gather(node_name()))
        _NODE_GROUPS.clear()  # of a default group that has ended
        _NODE_GROUPS[world] = _own_group(nodes) if len(nodes) > 1 else None
    return _NODE_GROUPS[world]


def ranks_by_node(names: Sequence[str]) -> list[list[int]]:
    """Return the ranks of each node; all nodes must have the same number of ranks."""
    nodes: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        nodes.setdefault(name, []).append(rank)
    most, least = (f(nodes, key=lambda name: len(nodes[name])) for f in (max, min))
    if len(nodes[most]) != len(nodes[least]):
        raise ConfigError(
            "megakd.shard_within_node in a teacher's DeepSpeed config needs the same number of "
            f"ranks on every node: {most} has {len(nodes[most])}, {least} has "
            f"{len(nodes[least])}; start as many ranks on every node, or use the preset "
            "teacher_zero3, which shards over all ranks"
        )
    return list(nodes.values())


def _own_group(nodes: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    # Every rank must create the groups of all nodes. By default, a group of NCCL would ignore
    # `train.collective_timeout`.
    timeout = distributed_c10d.default_pg_timeout
    groups = [dist.new_group(list(ranks), timeout=timeout) for ranks in nodes]
    group = groups[next(n for n, ranks in enumerate(nodes) if dist.get_rank() in ranks)]
    assert isinstance(group, dist.ProcessGroup)  # noqa: S101 - this rank is a member
    return group


def check_nodes(config: RunConfig) -> None:
    """Raise if DeepSpeed does not read a config, or if the nodes cannot hold a teacher each.

    A collective if a teacher is sharded within nodes.
    """
    configs = {where: load_ds_config(ds, where=where) for where, ds in config.ds_configs.items()}
    for where, ds in configs.items():
        check_zero(ds, where=where)
    if any(map(shards_within_node, configs.values())):
        node_group()


def check_zero(ds: Mapping[str, Any], *, where: str) -> None:
    """Check the keys and values of ZeRO by DeepSpeed's own model, whose import takes seconds."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**ds.get("zero_optimization", {}))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(map(str, ("zero_optimization", *detail["loc"])))
        fields = DeepSpeedZeroConfig.model_fields.items()
        known = [name for key, field in fields for name in (key, field.alias) if name]
        near = suggestion(detail["loc"][-1], known) if detail["type"] == "extra_forbidden" else ""
        got = json.dumps(detail["input"], default=str)
        raise ConfigError(f"{where}: {key}: {detail['msg']} (got {got}){near}") from None
