"""One rank in a process of its own that runs whole commands one after the other.

Runs draw no report.html; `page` draws it.

A start costs seconds, and DeepSpeed can join a process group only once in a process: here the
group outlives the commands. All else is what `launch/train.py` and `megakd` do.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import signal
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from forked_ranks import FORKS, settle_in, without_fsync, without_pictures

TIMEOUT_S = 300  # many times what a command takes, for a busy machine
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Outcome(NamedTuple):
    """Outcome of a command; `loaded` names the models whose weights it has loaded."""

    code: int
    out: str
    err: str
    loaded: tuple[str, ...]


class OneRank:
    """Runs commands as a user would, without the seconds of a start.

    code: the exit code that a test expects, if any.
    """

    def __init__(self) -> None:
        self._end, theirs = FORKS.Pipe()
        self._process = FORKS.Process(target=_serve, args=(theirs, dict(os.environ)), daemon=True)
        self._process.start()

    def train(
        self, *arguments: object, stop_at: tuple[str, int] | None = None, code: int | None = None
    ) -> Outcome:
        """`launch/train.py ARGUMENTS`; SIGTERM comes after a step of a stage, if one is named."""
        return self._run("train_main", arguments, stop_at, code)

    def megakd(self, *arguments: object, code: int | None = None) -> Outcome:
        """`megakd ARGUMENTS`."""
        return self._run("main", arguments, None, code)

    def page(self, out: Path) -> str:
        """Return the report.html of a run, which `megakd report` draws."""
        self.megakd("report", out, code=0)
        return (out / "report.html").read_text(encoding="utf-8")

    def _run(
        self,
        entry: str,
        arguments: tuple[object, ...],
        stop_at: tuple[str, int] | None,
        code: int | None,
    ) -> Outcome:
        self._end.send((entry, [str(argument) for argument in arguments], stop_at))
        if not self._end.poll(TIMEOUT_S):
            self.stop()
            raise TimeoutError(f"no answer to {arguments} in {TIMEOUT_S} s")
        answer, failure = self._end.recv()
        if failure:
            raise AssertionError(f"{entry} {arguments} failed:\n{failure}")
        assert code in (None, answer.code), (answer.code, answer.out, answer.err)
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(requests: Connection, variables: dict[str, str]) -> None:
    settle_in(variables)
    without_fsync()
    without_pictures()
    import megakd.training.assembly
    from megakd import cli
    from megakd.engine import distributed
    from megakd.training.meter import TrainMeter

    loaded: list[str] = []
    _note_loads(megakd.training.assembly, loaded)
    stops: list[tuple[str, int] | None] = [None]
    _send_signals(TrainMeter, stops)
    distributed.stop = lambda **_: None
    while True:
        try:
            entry, arguments, stops[0] = requests.recv()
        except EOFError:
            return
        loaded.clear()
        requests.send(_answer(getattr(cli, entry), arguments, loaded))


def _note_loads(assembly, loaded: list[str]) -> None:
    load_model = assembly.load_model

    def noting(source, **facts):
        loaded.append(source.name)
        return load_model(source, **facts)

    assembly.load_model = noting


def _send_signals(meter, stops: list[tuple[str, int] | None]) -> None:
    add = meter.add

    def signalling(self, report):
        if stops[0] == (self._stage, report.step + 1):
            signal.raise_signal(signal.SIGTERM)
        add(self, report)

    meter.add = signalling


def _answer(command, arguments: list[str], loaded: list[str]) -> tuple[Outcome | None, str]:
    gc.freeze()  # the last run has unfrozen all modules, and a collection walks over them
    out, err = io.StringIO(), io.StringIO()
    place = {name: os.environ.pop(name) for name in LAUNCHERS if name in os.environ}
    logging.getLogger().handlers.clear()  # the last command's standard error
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command(arguments)
    except BaseException:  # noqa: BLE001 - whatever it is, the test has to show it
        return None, f"{err.getvalue()}\n{traceback.format_exc()}"
    finally:
        os.environ.update(place)
    return Outcome(code, out.getvalue(), err.getvalue(), tuple(loaded)), ""
