"""Runs that are killed, stopped, starved and damaged at random moments, against unbroken runs.

`python benchmarks/faults.py --minutes 60 [--cases minidisc,on_policy] [--seed 1]`, on CPU ranks,
with the tiny models and data of the tests. A trial is a run of a method at some ZeRO stages that
meets up to three faults, and is started again after each, as a launcher or its user would:

* kill: SIGKILL to one rank; the others must end by themselves.
* freeze: one rank is stopped for good; the others must end by themselves.
* slow: one rank is stopped for two seconds, and nothing else happens.
* stop: SIGTERM to all ranks.
* full disk: no file of the run may grow beyond 30 kB from a moment on.
* flip, cut: the run is killed, and a byte of a checkpoint or a model is flipped, or its end is cut.
* ranks: the run is killed, and goes on with one rank instead of two, or with two instead of one.

It must end with the log of an unbroken run, each step once, and with its weights bit for bit; after
other ranks, only the log is compared, because dropout differs. Exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests/support")]

from forked_ranks import start_rank  # noqa: E402 - of the tests, with their runs
from golden_cases import CASES, write_data  # noqa: E402
from tiny_runs import config_tree, write_config  # noqa: E402

from lib.launching import records_of  # noqa: E402
from lib.options import parsed, parser_of, positive, words_of  # noqa: E402
from lib.tables import print_rows  # noqa: E402
from megakd.engine.distributed import free_port  # noqa: E402

ROWS = 8
SIZES = {"max_steps": 20, "per_device_train_batch_size": ROWS // 2, "collective_timeout": 12}
WAIT_S = 120.0
MEETING_S = 3 * SIZES["collective_timeout"]
"""Limit before all ranks have met: who waits cannot tell a rank that is dead from one that is late,
and torch tries to connect twice."""
ENDS_ALONE = "the other ranks did not end"


class Case(NamedTuple):
    """A run: the name of a recorded case, the ZeRO stages, and the ranks that it begins with."""

    name: str
    student: int
    teacher: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.name} zero{self.student}/{self.teacher} x{self.ranks}"


class Start:
    """The ranks of one start of a run."""

    def __init__(self, config: Path, out: Path, ranks: int, script: str = "train") -> None:
        self.log = out.with_name(f"{out.name}.txt")
        self._earlier = len(self._lines())
        rows = f"train.per_device_train_batch_size={ROWS // ranks}"
        file = str(ROOT / f"launch/{script}.py")
        words = [file, "--config", str(config), f"output_dir={out}", rows]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
        self.processes: list[BaseProcess] = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
            told = {key: str(value) for key, value in {**place, **meeting}.items()}
            self.processes.append(start_rank(words, variables=os.environ | told, log=self.log))

    def alive(self) -> list[BaseProcess]:
        return [process for process in self.processes if process.exitcode is None]

    def wait(self, *, but: Sequence[BaseProcess] = (), limit_s: float = WAIT_S) -> bool:
        """Wait until all ranks have ended `but` some; return False after the limit."""
        deadline = time.monotonic() + limit_s
        while any(process not in but for process in self.alive()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def send(self, number: int, *, to: Sequence[BaseProcess] | None = None) -> None:
        for process in self.alive() if to is None else to:
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)

    def end(self) -> None:
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()

    @property
    def has_met(self) -> bool:
        """Whether all ranks have met: rank 0 logs how long the rows are soon after."""
        return " p50 " in self._lines()[self._earlier :]

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def last_words(self) -> str:
        lines = self._lines().splitlines()
        return next((line for line in reversed(lines) if "megakd: " in line), "nothing")

    def _lines(self) -> str:
        return self.log.read_text("utf-8", errors="replace") if self.log.exists() else ""


class Truth(NamedTuple):
    """The unbroken run of a case."""

    case: Case
    config: Path
    out: Path
    seconds: float


class LostError(Exception):
    """Something was lost, or a run did not end as it should."""


class Trial:
    """A run that meets faults."""

    def __init__(self, truth: Truth, out: Path, rng: random.Random) -> None:
        self._case, self._config, self._seconds = truth.case, truth.config, truth.seconds
        self.out, self._rng = out, rng
        self.ranks = truth.case.ranks
        self.faults: list[str] = []

    def run(self) -> None:
        faults = self._rng.choices([*FAULTS], k=self._rng.randint(1, 3))
        for fault in faults:
            self._repair(self._start(fault))
        last = self._start(None)
        while self._repair(last):
            last = self._start(None)
        if any(last.codes):
            raise LostError(f"exit codes {last.codes}: {last.last_words()}")

    def _start(self, fault: str | None) -> Start:
        start = Start(self._config, self.out, self.ranks)
        try:
            if fault is not None:
                start.wait(limit_s=self._rng.uniform(0.5, self._seconds))
                if start.alive():
                    self.faults.append(fault)
                    FAULTS[fault](self, start)
            if not start.wait():
                raise LostError(f"no end after {fault or 'all faults'}")
        finally:
            start.end()
        return start

    def kill(self, start: Start) -> None:
        victim, limit_s = self._rng.choice(start.alive()), 10 if start.has_met else MEETING_S
        start.send(signal.SIGKILL, to=[victim])
        if not start.wait(limit_s=limit_s):
            raise LostError(f"{ENDS_ALONE} within {limit_s} s of a kill")

    def freeze(self, start: Start) -> None:
        victim, twice = self._rng.choice(start.alive()), 2 * SIZES["collective_timeout"]
        limit_s = twice if start.has_met else MEETING_S
        start.send(signal.SIGSTOP, to=[victim])
        if not start.wait(but=[victim], limit_s=limit_s):
            raise LostError(f"{ENDS_ALONE} within {limit_s} s of one that was stopped")
        start.end()

    def slow(self, start: Start) -> None:
        victim = self._rng.choice(start.alive())
        start.send(signal.SIGSTOP, to=[victim])
        start.wait(limit_s=2.0)
        start.send(signal.SIGCONT, to=[victim])

    def stop(self, start: Start) -> None:
        start.send(signal.SIGTERM)

    def fill(self, start: Start) -> None:
        for process in start.alive():
            with suppress(ProcessLookupError):
                limits = resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE)
                resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, (30_000, limits[1]))

    def flip(self, start: Start) -> None:
        start.end()
        for path in self._any_file():
            content = bytearray(path.read_bytes())
            content[self._rng.randrange(len(content))] ^= 1 << self._rng.randrange(8)
            path.write_bytes(content)

    def cut(self, start: Start) -> None:
        start.end()
        for path in self._any_file():
            content = path.read_bytes()
            path.write_bytes(content[: self._rng.randrange(len(content))])

    def other_ranks(self, start: Start) -> None:
        start.end()
        # A stream that one rank began has one reader, which two ranks cannot share.
        if self._case.name != "stream" or self._case.ranks > 1:
            self.ranks = 3 - self.ranks

    def _any_file(self) -> list[Path]:
        kept = [self.out / "checkpoints", self.out / "stages"]
        files = [path for top in kept for path in top.rglob("*") if path.is_file()]
        sized = sorted(path for path in files if path.stat().st_size)
        return self._rng.sample(sized, min(1, len(sized)))

    def _repair(self, start: Start) -> bool:
        """Remove what the message of a start names as of no use, as its user would."""
        words = start.last_words()
        reasons = ["damaged"]
        if "ranks" in self.faults:
            # A stage that is made again may have other weights than its successors were made from;
            # a start says so of a stage, and of a checkpoint.
            reasons += ["the result of another config", "was written with another config"]
        # 2 is the exit code of a start that asks its user to remove something.
        if 2 not in start.codes or not any(reason in words for reason in reasons):
            return False
        folders = [path for top in ("stages", "checkpoints") for path in (self.out / top).glob("*")]
        named = [path for path in folders if str(path) in words]
        for path in named:
            shutil.rmtree(path)
        (self.out / "report.json").unlink(missing_ok=True)
        return bool(named)


FAULTS: Mapping[str, Callable[[Trial, Start], None]] = {
    "kill": Trial.kill,
    "freeze": Trial.freeze,
    "slow": Trial.slow,
    "stop": Trial.stop,
    "full disk": Trial.fill,
    "flip": Trial.flip,
    "cut": Trial.cut,
    "ranks": Trial.other_ranks,
}


class Truths:
    """Unbroken runs by case, which are made when they are needed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.known = folder, dict[Case, Truth]()
        self._data = write_data(folder / "data")

    def of(self, case: Case) -> Truth:
        if case not in self.known:
            place = self._folder / str(case).replace(" ", "-").replace("/", "-")
            config, out = write_config(place / "run.yaml", self._tree(case)), place / "truth"
            if case.name == "cache":
                unbroken(Start(config, place / "cached", case.ranks, "cache_teacher"))
            began = time.monotonic()
            unbroken(Start(config, out, case.ranks))
            self.known[case] = Truth(case, config, out, time.monotonic() - began)
        return self.known[case]

    def _tree(self, case: Case) -> dict[str, Any]:
        given: dict[str, Any] = CASES[case.name](self._data)
        given["student"] = {**given.get("student", {}), "deepspeed": f"zero{case.student}"}
        zero = {"deepspeed": f"teacher_zero{case.teacher}"}
        if "teacher" in given:
            given["teacher"] = {**given["teacher"], **zero}
        for teacher in given.get("teachers", []):
            teacher.update(zero)
        train = {**SIZES, **given.pop("train", {}), "per_device_train_batch_size": ROWS // 2}
        train["gradient_accumulation_steps"] = 1
        return config_tree(
            Path("unused"),
            given.pop("task"),
            **given,
            train=train,
            save={"save_steps": 4, "save_total_limit": 2},
            log={"logging_steps": 1, "report_to": []},
        )


def unbroken(start: Start) -> None:
    ended = start.wait(limit_s=5 * WAIT_S)
    start.end()
    if not ended or any(start.codes):
        raise LostError(f"a start without faults ended with {start.codes}, see {start.log}")


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    rng, deadline = random.Random(given.seed), time.monotonic() + 60 * given.minutes
    survived, lost, runs = Counter[str](), list[str](), 0
    folder = Path(tempfile.mkdtemp(prefix="megakd-faults-"))
    os.environ["MEGAKD_CACHE"] = str(folder / "cache")
    truths = Truths(folder)
    while time.monotonic() < deadline:
        truth = truths.of(drawn(truths, given.cases, rng))
        trial = Trial(truth, folder / f"trial-{runs}", rng)
        runs += 1
        try:
            trial.run()
            check_same(trial, truth.out)
        except LostError as error:
            lost.append(f"{truth.case}: {' + '.join(trial.faults)}: {error}, see {trial.out}")
            print(f"LOST {lost[-1]}", flush=True)
            continue
        survived.update(trial.faults)
        print(f"{truth.case}: survived {' + '.join(trial.faults) or 'nothing'}", flush=True)
        shutil.rmtree(trial.out)
    return show(survived, lost, runs, folder, given)


def drawn(truths: Truths, names: Sequence[str], rng: random.Random) -> Case:
    """Draw a case; two trials of three are of a case whose unbroken run is known."""
    if truths.known and rng.random() < 2 / 3:
        return rng.choice([*truths.known])
    return Case(rng.choice(names), rng.randrange(4), rng.choice([0, 3]), rng.randint(1, 2))


def check_same(trial: Trial, truth: Path) -> None:
    # A stage that was damaged and is made again comes later in the log.
    steps, wanted = sorted(logged(trial.out)), sorted(logged(truth))
    if "ranks" in trial.faults:
        # Their sums may decide between close candidates, and another candidate has other stages.
        common = {line[0] for line in steps} & {line[0] for line in wanted}
        steps, wanted = ([one for one in some if one[0] in common] for some in (steps, wanted))
    if steps != wanted:
        raise LostError(f"{len(steps)} lines of the log instead of {len(wanted)}, or others")
    if "ranks" in trial.faults:
        return
    weights = "final/model.safetensors"
    if (trial.out / weights).read_bytes() != (truth / weights).read_bytes():
        raise LostError("other weights")


def logged(out: Path) -> list[tuple[str, int, bool]]:
    """Return the stage and the step of every line of the log, and whether it has a loss."""
    return [(line["stage"], line["step"], "train/loss" in line) for line in records_of(out)]


def show(
    survived: Counter[str], lost: Sequence[str], runs: int, folder: Path, given: argparse.Namespace
) -> int:
    counts = ", ".join(f"{name} {survived[name]}" for name in FAULTS)
    numbers = f"{survived.total()} faults survived in {runs} runs ({counts}); {len(lost)} lost"
    print_rows(given.command, (f"faults for {given.minutes} minutes", numbers, "-"))
    if not lost:
        shutil.rmtree(folder)
    return 1 if lost else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=positive, required=True)
    parser.add_argument("--seed", type=int, default=0)
    words = {"type": words_of(CASES), "default": [*CASES]}
    parser.add_argument("--cases", **words, help="recorded cases of the tests")
    return parsed(parser, "faults", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
