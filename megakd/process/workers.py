"""Work in several processes, with results in order."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

from megakd.errors import MegakdError

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST = 16


def processes_for(count: int, *, each: int) -> int:
    """Return how many processes to use for `count` items, at least `each` for every process."""
    return max(1, min(MOST, len(os.sched_getaffinity(0)), count // each))


def in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], processes: int
) -> Iterator[Result]:
    """Yield `function(item)` for all items in order, computed by forked processes.

    Process k computes items k, k + processes, ...; it waits while its next results are not read,
    and ends with its parent, however the parent ends.
    """
    if processes == 1:
        yield from map(function, items)
        return
    readers: list[Connection] = []
    workers: list[BaseProcess] = []
    try:
        workers.extend(_forked(function, items[k::processes], readers) for k in range(processes))
        for number in range(len(items)):
            result = readers[number % processes].recv()
            if isinstance(result, MegakdError):
                raise result
            yield result
    except EOFError:
        raise MegakdError(
            f"one of {processes} processes that encode rows ended early; its error is above, or "
            "the machine has no memory left: allow fewer cores (taskset -c 0-3 ...)"
        ) from None
    finally:  # a process that still sends ends, because its pipe is closed
        for reader in readers:
            reader.close()
        for worker in workers:
            worker.join()


def _forked(
    function: Callable[[Item], Result], items: Sequence[Item], readers: list[Connection]
) -> BaseProcess:
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    readers.append(reader)

    def send() -> None:
        for other in readers:  # only the parent reads: without it, `send` fails
            other.close()
        try:
            for item in items:
                writer.send(function(item))
        except BrokenPipeError:
            pass
        except MegakdError as error:
            with suppress(BrokenPipeError):
                writer.send(error)

    with warnings.catch_warnings():
        # The process uses no lock that a thread of its parent may hold.
        warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)
        worker = context.Process(target=send, daemon=True)
        worker.start()
    writer.close()
    return worker
