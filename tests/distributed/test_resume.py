"""A run that is killed, damaged or out of space and started again is the run that never was."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import cases
import pytest
import torch
from tiny_runs import bert, pairs_task, run_in
from torch.utils._pytree import tree_leaves

from megakd.engine import distributed
from megakd.training import checkpoint

TEACHER, STUDENT = STAGES = ("teacher-finetune", "student")
STEPS = 8  # of each stage
SAVE_STEPS = 4
WORLD = 2
# How long things take is no part of a run's result.
TIMES = (
    "time", "train/tokens_per_s", "train/step_seconds", "train/teacher_share", "train/data_share",
    "train/memory_bytes", "train/student_tflops", "train/teacher_tflops",
)  # fmt: skip


def command_without_space(*arguments: str) -> tuple[int, str]:
    """Run a command; rank 1 has no space on its disk when it saves step 8."""
    write = checkpoint.write_files

    def write_without_space(folder: Path, contents: Any) -> Any:
        if folder.name.startswith("step-8") and distributed.ranks().rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(folder, contents)

    with patch.object(checkpoint, "write_files", write_without_space):
        return cases.command(*arguments)


class Run(NamedTuple):
    config: Path
    out: Path

    def arguments(self) -> tuple[str, ...]:
        return ("--config", str(self.config), f"output_dir={self.out}")

    def checkpoint(self, stage: str, step: int = STEPS) -> Path:
        return self.out / "checkpoints" / stage / f"step-{step}"

    def best(self, stage: str) -> list[Path]:
        return list((self.out / "checkpoints" / stage / "best").glob("step-*"))

    def records(self) -> list[dict[str, Any]]:
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # The last line may be half written while the run is watched.
        return [json.loads(line) for line in lines if line.endswith("}")]


def write_run(folder: Path) -> Path:
    """Evaluation and saving fall on different steps; a save ends a window of the log."""
    steps = {"max_steps": STEPS}
    finetune = {**steps, "learning_rate": 0.003, "deepspeed": "zero2"}
    return run_in(
        folder,
        pairs_task(folder),
        teacher={"model": bert(2), "deepspeed": "teacher_zero3", "finetune": finetune},
        # Dropout is left on: without it, a run could lose its random numbers unnoticed.
        student={"model": bert(1), "deepspeed": "zero3"},
        method={"name": "single"},
        objective=[
            {"loss": "hidden_mse", "weight": 0.1, "layer_mapping": ["1:2"]},
            {"loss": "hard_mse", "weight": 0.5},
            {"loss": "soft_target_mse", "weight": 0.5},
        ],
        eval={"eval_steps": 3},
        save={"save_steps": SAVE_STEPS},  # all are kept, to be compared
        log={"logging_steps": 2},
        train={**steps, "learning_rate": 0.005, "gradient_accumulation_steps": 2},
    )


@pytest.fixture(scope="module")
def truth(command, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("truth")
    run = Run(write_run(folder), folder / "out")
    command(*run.arguments(), code=0)
    for stage in STAGES:
        assert [r for r in run.records() if r["stage"] == stage and "eval/pearson" in r], stage
    return run


def assert_same_run(run: Run, truth: Run) -> None:
    """Weights to the last bit, the best evaluations, and every logged number, once and in order."""
    for name in ("final", *(f"stages/{stage}" for stage in STAGES)):
        weights = f"{name}/model.safetensors"
        assert (run.out / weights).read_bytes() == (truth.out / weights).read_bytes(), weights
    assert logged(run) == logged(truth)
    for stage in STAGES:
        best = [sorted(p.name for p in one.best(stage)) for one in (run, truth)]
        assert best[0] == best[1]
        assert_same_tensors(*(one.checkpoint(stage) for one in (run, truth)))


def logged(run: Run) -> dict[str, list[dict[str, Any]]]:
    records = [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in run.records()
    ]
    return {stage: [r for r in records if r["stage"] == stage] for stage in STAGES}


def assert_same_tensors(folder: Path, wanted: Path) -> None:
    """The last weights, Adam's moments and the random numbers: the best may be older."""
    for name in (f"{kind}-{rank}.pt" for kind in ("engine", "rank") for rank in range(WORLD)):
        one, other = (
            [
                leaf
                for leaf in tree_leaves(torch.load(at / name, weights_only=True))
                if isinstance(leaf, torch.Tensor)
            ]
            for at in (folder, wanted)
        )
        assert other
        assert len(one) == len(other)
        assert all(map(torch.equal, one, other)), name


def logged_since(run: Run, stage: str, count: int) -> Callable[[float], bool]:
    def moment(started: float) -> bool:
        records = [r for r in run.records() if r["stage"] == stage]
        return sum(r["time"] > started for r in records) >= count

    return moment


def saving(run: Run, stage: str) -> Callable[[float], bool]:
    """When this start writes a checkpoint; one that was killed may have left its own."""
    folder = run.out / "checkpoints" / stage
    left = set(folder.glob("*.partial"))
    return lambda _: bool(set(folder.glob("*.partial")) - left)


def test_a_run_killed_again_and_again_ends_as_if_it_had_never_been(
    truth, launch, command, tmp_path
):
    rng = random.Random(seed := random.randrange(10**6))
    run = truth._replace(out=tmp_path / "killed")

    def kill(moment: Callable[[float], bool], delay_s: float, rank: int | None = None) -> None:
        """Start the run, and kill it a random while after `moment(start time)` holds."""
        group = launch(*run.arguments())
        # The ranks need the core that looking takes.
        often = max(0.001, min(0.01, delay_s / 10))
        reached = group.wait_until(lambda: moment(group.started), look_every_s=often)
        time.sleep(rng.uniform(0, delay_s))
        group.kill(rank)
        # A run that has ended before is no failure of resuming, unless it ended badly.
        assert reached or [p.exitcode for p in group.processes] == [0] * WORLD, group.text

    try:
        kill(saving(run, rng.choice(STAGES)), 0.02)
        kill(logged_since(run, STUDENT, rng.randint(1, STEPS // 2)), 0.1, rng.randrange(WORLD))
        command(*run.arguments(), code=0)
        assert_same_run(run, truth)
    except BaseException:
        print(f"seed {seed}")  # noqa: T201 - shown with the failure
        raise
    assert not [path.name for path in run.out.rglob("*.partial")]
    assert not [path.name for path in run.out.rglob(".*.new")]


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock of a start that was killed, in an extensions folder of the test's own."""
    folder = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    lock = folder / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))  # the start of a process is known to a second
    return lock


def unfinished(truth: Run, out: Path) -> Run:
    """A copy of the run without its report and the results of its last stage."""
    shutil.copytree(truth.out, out)
    for name in ("report.json", "final/README.md"):
        (out / name).unlink()
    shutil.rmtree(out / "stages" / STUDENT)
    return truth._replace(out=out)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_without_it_the_stage_goes_on_from_the_one_before(
    truth, command, launch, lock, tmp_path
):
    run = unfinished(truth, tmp_path / "damaged")
    newest, last = run.checkpoint(STUDENT), STEPS - SAVE_STEPS
    flipped = newest / "engine-1.pt"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 0x10
    flipped.write_bytes(content)

    refused = command(*run.arguments(), code=2).text

    assert f"{newest} is damaged: the checksum of engine-1.pt differs; " in refused
    assert f"remove {newest}, and the stage goes on from the checkpoint before it" in refused
    shutil.rmtree(newest)
    group = launch(*run.arguments())
    assert group.wait() == [0] * WORLD, group.text
    assert f"student: resumed at step {last} from {run.checkpoint(STUDENT, last)}" in group.text
    assert group.text.count(f"removed the lock {lock} of a process that was killed") == 1
    assert_same_run(run, truth)


def test_a_damaged_best_evaluation_is_an_error_of_all_ranks(truth, command, tmp_path):
    run = unfinished(truth, tmp_path / "damaged")
    weights = max(run.best(STUDENT)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")

    outcome = command(*run.arguments(), code=2).text

    assert outcome.count("megakd: error:") == 1
    assert "is damaged: the checksum of model.safetensors differs" in outcome
    assert f"remove {run.out / 'checkpoints' / STUDENT} to train the stage again" in outcome


def test_a_finished_run_started_again_prints_its_table_and_changes_nothing(truth, command):
    report = (truth.out / "report.json").read_bytes()
    before = logged(truth)

    text = command(*truth.arguments(), code=0).text

    assert f"the student is in {truth.out / 'final'}" in text
    assert "resumed" not in text
    assert (truth.out / "report.json").read_bytes() == report
    assert logged(truth) == before


def test_a_disk_that_is_full_on_one_rank_stops_all_with_one_message(truth, command, tmp_path):
    run = truth._replace(out=tmp_path / "full")

    # The last save is made at once, and this one beside the steps that follow.
    words = (*run.arguments(), "teacher.finetune.max_steps=12")
    _, text = command(*words, case="test_resume.command_without_space", code=2)

    folder = run.out / "checkpoints" / "teacher-finetune"
    assert text.count("megakd: error:") == 1
    assert f"the checkpoint of step 8 could not be written to {folder}: " in text
    assert f"the last good checkpoint is {folder / 'step-4'}; free some space" in text
    assert {path.name for path in folder.iterdir()} >= {"step-4"}
    assert not [path.name for path in folder.iterdir() if "step-8" in path.name]
