"""Collectives: sums of tensors from any device, and Python objects, of all ranks of a run.

Tensors go through the default process group, with the limit of `train.collective_timeout`: the
ranks compute the same, so that none waits long. Python objects go through a group of their own on
the CPU, where ranks wait hours for a rank that reads, encodes or writes files. `activity` says what
the ranks do, in the log and in the error of a rank that waits too long.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megakd.errors import CollectiveTimeoutError, MegakdError, PeerLostError

logger = logging.getLogger(__name__)

T = TypeVar("T")
WORK_LIMIT = timedelta(hours=24)
"""How long ranks wait for the work of another rank; a rank that dies ends the wait at once."""
_GROUPS: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
"""The group for objects, by the default group."""
# The number of the node, from DeepSpeed's launcher, torchrun and Slurm. Two launchers on one host
# are two nodes, as the launchers say, and two hosts may have the same name.
_NODE_NUMBERS = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")
# Parts of error messages of gloo, of its sockets, and of NCCL.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
)
_TIMED_OUT = ("Timed out waiting", "collective operation timeout")
_NOT_CONNECTED = ("connectFullMesh failed", "Unable to find address for")


def backend_for(device: str, backend: str) -> str:
    """Return the backends of the default process group."""
    return backend if device == "cpu" else f"cpu:gloo,{device}:{backend}"


def all_reduce_(tensor: torch.Tensor, *, largest: bool = False) -> torch.Tensor:
    """Reduce a tensor of any device over the ranks in place: the sum, or the maximum."""
    if dist.get_world_size() == 1:
        return tensor
    known = {device.type for device in _default_group()._device_types}  # noqa: SLF001
    # A group that somebody else has started may have no backend for the CPU.
    group = None if not known or tensor.device.type in known else _object_group()
    operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    dist.all_reduce(tensor, op=operation, group=group)
    return tensor


def broadcast(value: T) -> T:
    """Return rank 0's value on every rank, for values that decide control flow; a collective."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_object_group())
    return box[0]


def gather(value: T) -> list[T]:
    """Return the values of all ranks, by rank; a collective."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_object_group())
    return values


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0, and return its result or raise its error on every rank."""
    result, error = broadcast(_outcome(action) if dist.get_rank() == 0 else (None, None))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def main_first(action: Callable[[], T]) -> T:
    """Run `action` on rank 0, then on the other ranks, which can reuse the files of rank 0.

    The error of the first rank that failed is raised on all ranks.
    """
    made: list[T] = []  # on rank 0
    on_main(lambda: made.append(action()))
    return raise_on_all(lambda: made[0] if made else action())


def once_per_node(action: Callable[[], T], *, place: str) -> T:
    """Run `action` on rank 0 and, where its files are missing, on the first rank of each node.

    All other ranks get the pickled result of the first rank of their node. The pickle of a
    memory-mapped data set contains the paths of the files, not the rows.

    Args:
        action: function that writes files, or finds the files, and returns what maps the files.
        place: folder of the files; ranks of one host with different folders are different nodes.
    """
    if dist.get_world_size() == 1:
        return action()
    results: list[T] = []  # the result on a rank that ran `action`

    def pickled() -> bytes:
        results.append(action())
        return pickle.dumps(results[0])

    made = on_main(pickled)
    nodes = gather((node_name(), place))
    first = nodes.index(nodes[dist.get_rank()])  # the first rank of this node
    is_first = first == dist.get_rank()
    # The files of rank 0 are there on its own node, and on every node that shares the folder.
    lacks = raise_on_all(lambda: is_first and not results and not _can_open(made))
    filled = gather(raise_on_all(pickled if lacks else bytes))
    return raise_on_all(lambda: results[0] if results else pickle.loads(filled[first] or made))  # noqa: S301


def node_name() -> str:
    """Return the name of this rank's node: the host, and the number that the launcher gives."""
    number = next((os.environ[name] for name in _NODE_NUMBERS if os.environ.get(name)), None)
    host = socket.gethostname()
    return host if number is None else f"{host} (node {number})"


@contextmanager
def reports_lost_peer() -> Iterator[None]:
    """Convert the error of a collective that another rank has left into a one-line error.

    Raises:
        PeerLostError: another rank has ended, or cannot be reached.
        CollectiveTimeoutError: another rank did not join within `train.collective_timeout`.
    """
    try:
        yield
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0]
        rank = f"rank {os.environ.get('RANK', '0')} on {node_name()}"
        work = next(iter(getattr(error, "__notes__", ())), "starting")  # see `activity`
        if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise PeerLostError(
                f"{rank} does not meet all of {os.environ.get('WORLD_SIZE')} ranks at {place} "
                f"while {work} ({first}); see the output of the others, and start all nodes with "
                "the same number of nodes and of ranks per node"
            ) from error
        if any(words in first for words in _NOT_CONNECTED):
            interface = os.environ.get("GLOO_SOCKET_IFNAME", "not set")
            raise PeerLostError(
                f"{rank} cannot connect to another rank over gloo ({first.rpartition('] ')[2]}); "
                f"set GLOO_SOCKET_IFNAME ({interface}) on every node to the network interface "
                "that connects the nodes, such as eth0"
            ) from error
        if any(words in str(error) for words in _TIMED_OUT):
            raise CollectiveTimeoutError(
                f"{rank} has waited longer than train.collective_timeout for the other ranks while "
                f"{work}; see their output, or raise train.collective_timeout if that work may "
                "take so long"
            ) from error
        reason = next((words for words in _LOST if words in str(error)), None)
        if reason is None:
            raise
        raise PeerLostError(
            f"{rank} ends because another rank has ended while {work} ({reason}); see the output "
            "of the other ranks or of their launcher"
        ) from error


def _can_open(made: bytes) -> bool:
    try:
        pickle.loads(made)  # noqa: S301 - from rank 0 of this run
    except OSError:
        return False
    return True


def raise_on_all(action: Callable[[], T]) -> T:
    """Run `action`, which has no collectives, on every rank; raise on all ranks if one fails."""
    result, error = _outcome(action)
    rank, first = next(((r, e) for r, e in enumerate(gather(error)) if e is not None), (0, None))
    if first is None:
        return result  # type: ignore[return-value]
    if rank > 0 and isinstance(first, MegakdError):  # the others have no such error
        first.args = (f"rank {rank} on {gather(node_name())[rank]}: {first}",)
    raise first


def _outcome(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except (MegakdError, OSError) as error:
        return None, error


def _default_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("no process group has been started")
    return group


def _object_group() -> dist.ProcessGroup:
    """Return the group for objects; its first use is a collective."""
    world = _default_group()
    if world not in _GROUPS:
        group = dist.new_group(backend="gloo", timeout=WORK_LIMIT)
        assert isinstance(group, dist.ProcessGroup)  # noqa: S101 - every rank is a member
        _GROUPS.clear()  # of a default group that has ended
        _GROUPS[world] = group
    return _GROUPS[world]


_running: list[str] = []
_telling: list[str] = []
_TOLD_EVERY_S = 60.0


@contextmanager
def activity(what: str) -> Iterator[None]:
    """Log the activity of the body, such as `reading the data`, unless it is part of another."""
    if not _running:
        logger.info("%s", what)
    _running.append(what)
    try:
        yield
    except RuntimeError as error:  # of a collective, see `collectives.reports_lost_peer`
        error.add_note(what)
        raise
    finally:
        _running.pop()


def progress(items: Iterable[T], *, total: int, each: int = 1, unit: str = "rows") -> Iterator[T]:
    """Yield the items and tell how far the activity is, see `activity`.

    A terminal gets a bar if it takes more than some seconds, another standard error a line a
    minute, both from rank 0.

    Args:
        total: units of all items; `each`: units of an item.
    """
    what = _running[-1] if _running else "working"
    if _telling:  # parts of what is told already
        yield from items
        return
    _telling.append(what)
    try:
        yield from _told(items, what, total=total, each=each, unit=unit)
    finally:
        _telling.pop()


def _told(items: Iterable[T], what: str, *, total: int, each: int, unit: str) -> Iterator[T]:
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    if is_main and sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit=f" {unit}", leave=False, delay=3) as bar:
            for item in items:
                yield item
                bar.update(min(each, total - bar.n))
        return
    began = since = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now, done = time.monotonic(), min(number * each, total)
        if now - since > _TOLD_EVERY_S:
            since, left = now, round((now - began) * (total - done) / done / 60)
            counts = f"{done:,} of {total:,} {unit}"
            logger.info("%s, %s, about %d min left", what, counts, left)
