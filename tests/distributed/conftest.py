"""Starts ranks as processes of their own, watches them and kills them."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import pytest

# Worker processes import the cases by name, from wherever this process could.
sys.path.insert(0, str(Path(__file__).parent))

from forked_ranks import start_rank
from tiny_runs import merged, write_config

from megakd.engine.distributed import free_port

if TYPE_CHECKING:
    from gloo_workers import GlooWorkers

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"
# A start takes seconds; many times that on a busy machine.
TIMEOUT_S = 240


class Group:
    """The ranks of one start, each in a process group of its own, as a launcher has them.

    ranks: what the launcher tells each of them in variables.
    """

    def __init__(
        self, command: Sequence[str], *, ranks: Sequence[Mapping[str, object]], logs: Path
    ) -> None:
        self.started = time.time()
        self.logs = [logs / f"rank-{number}.txt" for number in range(len(ranks))]
        self.processes = []
        for told, log in zip(ranks, self.logs, strict=True):
            log.touch()
            variables = {key: str(value) for key, value in {**os.environ, **told}.items()}
            self.processes.append(start_rank(command, variables=variables, log=log))

    @property
    def text(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def running(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def wait(self) -> list[int]:
        # Ranks that run to their end need the cores that a quick look takes.
        self.wait_until(lambda: False, look_every_s=0.02)
        for process in self.processes:
            process.join()
        return [process.exitcode or 0 for process in self.processes]

    def wait_until(self, condition: Callable[[], bool], *, look_every_s: float = 0.001) -> bool:
        """Waits until the condition holds (True) or all ranks have ended (False)."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if not self.running():
                return False
            if time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"no end after {TIMEOUT_S} s; {self.text[-3000:]}")
            time.sleep(look_every_s)
        return True

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL to one rank, then, as a launcher does, to the others; or to all at once."""
        if rank is not None:
            _kill(self.processes[rank])
            time.sleep(0.3)
        for process in self.processes:
            _kill(process)
        for process in self.processes:
            process.join()


def _kill(process: BaseProcess) -> None:
    assert process.pid is not None
    # Its group is gone once it has ended, and not there before the process has made it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


GROUPS: list[Group] = []
"""All that `launch` has started."""


@pytest.fixture(autouse=True, scope="module")
def _no_rank_is_left() -> Iterator[None]:
    """Fail if a rank or a launcher that a test has started outlives the tests of a file."""
    yield
    below = psutil.Process().children(recursive=True)
    left = [group.text[-500:] for group in GROUPS if group.running()]
    left += [" ".join(words) for words in map(_words, below) if str(TRAIN) in words]
    GROUPS.clear()
    assert left == []


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Group]:
    """Starts `launch/train.py` on two ranks: `launch("--config", path)`.

    ranks: the variables of each rank, by default those of two.
    """

    def start(
        *arguments: str, program: Path = TRAIN, ranks: Sequence[Mapping[str, object]] = ()
    ) -> Group:
        logs = tmp_path_factory.mktemp("logs")
        GROUPS.append(Group([str(program), *arguments], ranks=ranks or ranks_of(2), logs=logs))
        return GROUPS[-1]

    return start


def ranks_of(count: int) -> list[dict[str, object]]:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    meeting |= {"WORLD_SIZE": count, "LOCAL_SIZE": count}
    return [{"RANK": rank, "LOCAL_RANK": rank, **meeting} for rank in range(count)]


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], GlooWorkers]]:
    """World size -> its long-lived ranks, started when first asked for."""
    from gloo_workers import GlooWorkers

    groups: dict[int, GlooWorkers] = {}

    def of(world: int) -> GlooWorkers:
        if world not in groups:
            groups[world] = GlooWorkers(world)
        return groups[world]

    yield of
    for group in groups.values():
        group.stop()


class Ended(NamedTuple):
    """The exit codes of the ranks of a command, and their output, rank 0 first."""

    codes: list[int]
    text: str


@pytest.fixture(scope="session")
def command(workers: Callable[[int], GlooWorkers]) -> Callable[..., Ended]:
    """Runs `launch/train.py ARGUMENTS` in long-lived ranks: `command("--config", path)`.

    case: what runs it, if not `cases.command`.
    code: the exit code that a test expects of all ranks, if any.
    """

    def run(*words: str, world: int = 2, case: str = "command", code: int | None = None) -> Ended:
        codes, texts = zip(*workers(world).run(case, *words), strict=True)
        ended = Ended([*codes], "\n".join(texts))
        assert code is None or ended.codes == [code] * world, ended.text
        return ended

    return run


@pytest.fixture
def has_next_window(
    command: Callable[..., Ended], tmp_path: Path
) -> Callable[..., tuple[Path, Path]]:
    """Two ranks finish a run; others go on from a step of a stage at a ZeRO stage; both folders.

    words: overrides for both.
    rows: of all ranks per step.
    """

    def run(
        config: str | Path, saved: str, *words: str, world: int = 1, zero: int = 0, rows: int = 12
    ) -> tuple[Path, Path]:
        whole, copied = tmp_path / "whole", tmp_path / "continued"
        kept = ("save.save_steps=1", "save.save_total_limit=null")
        words = ("--config", str(config), *words, *kept)
        command(*words, f"output_dir={whole}", code=0)
        as_it_was(whole, saved, copied)
        other = (
            f"train.per_device_train_batch_size={rows // world}",
            "train.gradient_accumulation_steps=1",
            f"student.deepspeed={{zero_optimization: {{stage: {zero}}}}}",
        )
        ended = command(*words, f"output_dir={copied}", *other, world=world, code=0)
        stage, _, step = saved.partition("/step-")
        place = copied / "checkpoints" / saved
        assert f"{stage}: resumed at step {step} from {place}, which" in ended.text
        return copied, whole

    return run


def as_it_was(out: Path, saved: str, copied: Path) -> None:
    """Copy a run's folder as it was when a checkpoint, `STAGE/step-STEP`, had been saved."""
    shutil.copytree(out, copied)
    then = (out / "checkpoints" / saved / "checksums.json").stat().st_mtime_ns
    for file in sorted(out.rglob("*"), reverse=True):
        there = copied / file.relative_to(out)
        if file.name == "run.json":  # written at the start, and once more at the end
            continue
        if file.is_file() and file.stat().st_mtime_ns > then:
            there.unlink()
        elif there.is_dir() and not any(there.iterdir()):
            there.rmdir()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from equal_runs import write_folder

    return write_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def write_run(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Write the config of a student of `equal_runs`, with sections that are merged in.

    stages: the ZeRO stages of student and teacher.
    """
    import equal_runs

    folder = tmp_path_factory.mktemp("runs")

    def write(name: str, terms, stages=(0, 0), **sections) -> str:
        path = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
        tree = equal_runs.config_tree(models, name, terms, stages)
        return str(write_config(path, merged({**tree, "output_dir": f"{path}-out"}, sections)))

    return write


@pytest.fixture(scope="session")
def distil(workers, write_run) -> Callable[..., tuple[str, list]]:
    """Train a student of `equal_runs`: its config, and what every rank has found."""

    from equal_runs import STEPS

    def train(name, terms, stages, *, ranks=2, steps=STEPS, case="train", **sections):
        path = write_run(name, terms, stages, **sections)
        return path, workers(ranks).run(case, path, [], steps)

    return train


@pytest.fixture(scope="module")
def run_case(workers, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list]:
    """Run a case in a folder of its own, with 4 rows of all ranks per micro-batch.

    Tests of a file that ask for the same run share what it has found.
    """

    @functools.cache
    def run(case: str, config: str, ranks: int, *overrides: str) -> list:
        out = tmp_path_factory.mktemp("case") / "out"
        rows = f"train.per_device_train_batch_size={4 // ranks}"
        return workers(ranks).run(case, config, [f"output_dir={out}", rows, *overrides])

    return run
