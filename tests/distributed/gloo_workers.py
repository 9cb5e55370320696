"""Long-lived gloo ranks that run functions of `cases.py` and send back what they return.

Starting DeepSpeed costs seconds; every test of a session shares one group per world size.
"""

from __future__ import annotations

import importlib
import os
import traceback
from multiprocessing.connection import Connection

from forked_ranks import FORKS, leave_modules_alone, settle_in, without_fsync, without_pictures
from torch.nn import functional

from megakd.engine import distributed

START_TIMEOUT_S = 300  # many times what a start takes, for a busy machine
CALL_TIMEOUT_S = 180


class GlooWorkers:
    """`world` ranks; `run` calls the same function on all of them."""

    def __init__(self, world: int) -> None:
        port = distributed.free_port()
        pipes = [FORKS.Pipe() for _ in range(world)]
        self._ends = [mine for mine, _ in pipes]
        self._ranks = [
            FORKS.Process(
                target=_serve, args=(theirs, rank, world, port, dict(os.environ)), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for rank in self._ranks:
            rank.start()
        self._collect(START_TIMEOUT_S, "start")

    def run(self, case: str, *arguments, timeout_s: float = CALL_TIMEOUT_S, **options) -> list:
        """What `cases.<case>(*arguments, **options)`, or a `module.case`, returned on each rank."""
        for end in self._ends:
            end.send((case, arguments, options))
        return self._collect(timeout_s, case)

    def _collect(self, timeout_s: float, what: str) -> list:
        answers = []
        for rank, end in enumerate(self._ends):
            if not end.poll(timeout_s):
                self.stop()
                raise TimeoutError(
                    f"rank {rank} did not finish {what} in {timeout_s} s: the ranks disagree"
                )
            answers.append(end.recv())
        failures = [answer for ok, answer in answers if not ok]
        if failures:
            raise AssertionError(f"{what} failed:\n" + "\n".join(failures))
        return [answer for _, answer in answers]

    def stop(self) -> None:
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.join()


def _serve(
    requests: Connection, rank: int, world: int, port: int, variables: dict[str, str]
) -> None:
    settle_in(variables)
    without_fsync()
    without_pictures()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    _answer(requests, distributed.start)
    while True:
        try:
            name, arguments, options = requests.recv()
        except EOFError:
            return
        module, _, function = name.rpartition(".")
        case = getattr(importlib.import_module(module or "cases"), function)
        plain = functional.linear
        _answer(requests, case, *arguments, **options)
        functional.linear = plain  # an engine that a case makes of DeepSpeed alone replaces it
        leave_modules_alone()


def _answer(requests: Connection, action, *arguments, **options) -> None:
    try:
        requests.send((True, action(*arguments, **options)))
    except BaseException:  # noqa: BLE001 - whatever it is, the test has to show it
        requests.send((False, traceback.format_exc()))
