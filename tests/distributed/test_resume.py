"""A run that is killed, damaged or out of space and started again is the run that never was."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import cases
import pytest
import torch
from tiny_runs import bert, merged, run_in

from megakd.engine import distributed
from megakd.training import checkpoint

TEACHER = "teacher-finetune"
# What learns under a method, after the teacher; the last one is the student.
LEARNERS = {
    "single": ("student",),
    "minidisc": ("trial-1", "trial-2"),
    "knowledge_selection": ("selector", "student"),
}
# Of each stage. An episode of selection is half of them, and may not end where a stage is saved.
STEPS = {"single": 8, "minidisc": 8, "knowledge_selection": 12}
SAVE_STEPS = 4
WORLD = 2
# How long things take is no part of a run's result.
TIMES = (
    "time",
    "train/tokens_per_s",
    "train/step_seconds",
    "train/teacher_share",
    "train/data_share",
    "train/memory_bytes",
    "train/student_tflops",
    "train/teacher_tflops",
)


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
    method: str

    @property
    def stages(self) -> tuple[str, ...]:
        return (TEACHER, *LEARNERS[self.method])

    @property
    def steps(self) -> int:
        return STEPS[self.method]

    def arguments(self) -> tuple[str, ...]:
        return ("--config", str(self.config), f"output_dir={self.out}")

    def checkpoint(self, stage: str, step: int) -> Path:
        return self.out / "checkpoints" / stage / f"step-{step}"

    def best(self, stage: str) -> list[Path]:
        return list((self.out / "checkpoints" / stage / "best").glob("step-*"))

    def records(self) -> list[dict[str, Any]]:
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # The last line may be half written while the run is watched.
        return [json.loads(line) for line in lines if line.endswith("}")]


def rows(count: int, rng: random.Random) -> Iterator[tuple[str, float]]:
    words = {"good": 1.0, "fine": 0.5, "fair": 0.2, "bad": -1.0, "poor": -0.6, "ugly": -0.3}
    for _ in range(count):
        chosen = rng.choices(list(words), k=rng.randint(3, 9))
        yield " ".join(chosen), round(sum(words[word] for word in chosen), 2)


def write_data(folder: Path) -> None:
    folder.mkdir()
    for name, count in (("train", 60), ("validation", 24)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "score"), *rows(count, random.Random(name))])


def sections(method: str, preset: str) -> dict[str, Any]:
    """One teacher and one student, or a student that is cut out of its teacher in two trials."""
    hidden = {"loss": "hidden_mse", "weight": 0.1}
    # Dropout is left on: without it, a run could lose its random numbers unnoticed.
    student, options, rate = {"model": bert(1), "deepspeed": preset}, {}, 0.005
    if method == "minidisc":
        student["model"] = "from_teacher"
        # No weight on size: a wide candidate becomes the assistant, and there is a second trial.
        options = {"sparsities": [0.25, 0.5, 0.75], "target_sparsity": 0.75, "tradeoff": 0.0}
        # Even sizes: ZeRO 3 pads the halves of an odd one with what it finds in memory.
        options |= {"round_to": 2}
        # So little that the order of the candidates is the order of their sizes.
        rate = 1e-5
    else:
        hidden["layer_mapping"] = ["1:2"]
    if method == "knowledge_selection":
        # Episodes and phases end at other steps than logging, evaluations and saves.
        options = {"episodes": 2, "episode_steps": STEPS[method] // 2}
        options |= {"phase_steps": 5}
    terms = [
        hidden,
        {"loss": "hard_mse", "weight": 0.5},
        {"loss": "soft_target_mse", "weight": 0.5},
    ]
    train = {"learning_rate": rate}
    return {
        "student": student,
        "method": {"name": method, **options},
        "objective": terms,
        "train": train,
    }


def write_run(folder: Path, preset: str, method: str) -> Path:
    """Evaluation and saving fall on different steps; a save ends a window of the log."""
    write_data(folder / "data")
    columns = {"text_columns": ["text"], "label_column": "score"}
    steps = {"max_steps": STEPS[method]}
    finetune = {**steps, "learning_rate": 0.003, "deepspeed": preset}
    return run_in(
        folder,
        {"type": "regression", "dataset": str(folder / "data"), **columns},
        teacher={"model": bert(2), "deepspeed": "teacher_zero3", "finetune": finetune},
        eval={"eval_steps": 3},
        save={"save_steps": SAVE_STEPS},  # all are kept, to be compared
        log={"logging_steps": 2},
        **merged(sections(method, preset), {"train": {**steps, "gradient_accumulation_steps": 2}}),
    )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("zero3", "single"), id="single"),
        pytest.param(("zero2", "knowledge_selection"), marks=pytest.mark.slow, id="selection"),
        pytest.param(("zero3", "minidisc"), marks=pytest.mark.slow, id="minidisc"),
    ],
)
def truth(request, command, tmp_path_factory) -> Run:
    preset, method = request.param
    folder = tmp_path_factory.mktemp(preset)
    run = Run(write_run(folder, preset, method), folder / "truth", method)
    command(*run.arguments(), code=0)
    for stage in run.stages:
        assert [r for r in run.records() if r["stage"] == stage and "eval/pearson" in r], stage
    return run


def assert_same_run(run: Run, truth: Run) -> None:
    """Weights to the last bit, the best evaluations, and every logged number, once and in order."""
    for name in ("final", *(f"stages/{stage}" for stage in run.stages)):
        weights = f"{name}/model.safetensors"
        assert (run.out / weights).read_bytes() == (truth.out / weights).read_bytes(), weights
    assert logged(run) == logged(truth)
    for stage in run.stages:
        best = [sorted(p.name for p in one.best(stage)) for one in (run, truth)]
        assert best[0] == best[1]
        assert_same_tensors(*(one.checkpoint(stage, run.steps) for one in (run, truth)))


def logged(run: Run) -> dict[str, list[dict[str, Any]]]:
    records = [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in run.records()
    ]
    return {stage: [r for r in records if r["stage"] == stage] for stage in run.stages}


def assert_same_tensors(folder: Path, wanted: Path) -> None:
    """The last weights, Adam's moments and the random numbers: the best may be older."""
    for name in (f"{kind}-{rank}.pt" for kind in ("engine", "rank") for rank in range(WORLD)):
        actual, there = (
            dict(tensors(torch.load(at / name, weights_only=True), name)) for at in (folder, wanted)
        )
        assert there
        assert actual.keys() == there.keys()
        assert [key for key in there if not torch.equal(actual[key], there[key])] == []


def tensors(tree: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from tensors(value, f"{path}/{key}")


class Killer:
    """Starts a run again and again, and kills it at a chosen kind of moment."""

    def __init__(self, launch: Callable[..., Any], run: Run, rng: random.Random) -> None:
        self.launch, self.run, self.rng = launch, run, rng
        self.story: list[str] = []

    def start_until(
        self,
        what: str,
        moment: Callable[[float], bool],
        *,
        delay_s: float = 0.0,
        rank: int | None = None,
    ) -> None:
        """Kills a random while of at most `delay_s` after `moment(start time)` holds."""
        delay = self.rng.uniform(0, delay_s)
        group = self.launch(*self.run.arguments())
        # The ranks need the core that looking takes.
        often = max(0.001, min(0.01, delay_s / 10))
        reached = group.wait_until(lambda: moment(group.started), look_every_s=often)
        time.sleep(delay)
        group.kill(rank)
        killed = "all ranks" if rank is None else f"rank {rank}"
        self.story.append(f"{what} + {delay:.3f} s, {killed}: {_last_line(group.text)}")
        # A run that has ended before is no failure of resuming, unless it ended badly.
        assert reached or [p.exitcode for p in group.processes] == [0] * WORLD, group.text

    def logged(self, stage: str, count: int) -> Callable[[float], bool]:
        def moment(started: float) -> bool:
            records = [r for r in self.run.records() if r["stage"] == stage]
            return sum(r["time"] > started for r in records) >= count

        return moment

    def saving(self, stage: str) -> Callable[[float], bool]:
        """When this start writes a checkpoint; one that was killed may have left its own."""
        folder = self.run.out / "checkpoints" / stage
        left = set(folder.glob("*.partial"))
        return lambda _: bool(set(folder.glob("*.partial")) - left)

    def exists(self, *names: str) -> Callable[[float], bool]:
        return lambda _: any((self.run.out / name).exists() for name in names)


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "nothing said")[:80]


def test_a_run_killed_again_and_again_ends_as_if_it_had_never_been(
    truth, launch, command, tmp_path
):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    run = truth._replace(out=tmp_path / "killed")
    killer = Killer(launch, run, rng)
    teacher, student = TEACHER, run.stages[-1]

    try:
        killer.start_until("teacher saves", killer.saving(teacher), delay_s=0.02)
        killer.start_until("between", killer.exists(f"stages/{teacher}"), delay_s=0.6)
        for stage in run.stages[1:-1]:
            killer.start_until(stage, killer.logged(stage, rng.randint(1, 4)), delay_s=0.1)
        moment = killer.logged(student, rng.randint(1, run.steps // 2))
        killer.start_until("student", moment, delay_s=0.1, rank=rng.randrange(WORLD))
        killer.start_until("student saves", killer.saving(student), delay_s=0.02)
        if run.method == "minidisc":
            killer.start_until("final", killer.exists(".final.new", "final"))
        command(*run.arguments(), code=0)
        assert_same_run(run, truth)
    except BaseException:
        print(f"seed {seed}", *killer.story, sep="\n")  # noqa: T201 - shown with the failure
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


def unfinished(truth: Run, out: Path, *stages: str) -> Run:
    """A copy of the run without its report and the results of some stages."""
    shutil.copytree(truth.out, out)
    for name in ("report.json", "final/README.md"):
        (out / name).unlink()
    for stage in stages:
        shutil.rmtree(out / "stages" / stage)
    return truth._replace(out=out)


def test_a_damaged_checkpoint_is_named_and_without_it_the_stage_goes_on_from_the_one_before(
    truth, command, launch, lock, tmp_path
):
    student = truth.stages[-1]
    run = unfinished(truth, tmp_path / "damaged", student)
    newest, last = run.checkpoint(student, run.steps), run.steps - SAVE_STEPS
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
    assert f"{student}: resumed at step {last} from {run.checkpoint(student, last)}" in group.text
    assert group.text.count(f"removed the lock {lock} of a process that was killed") == 1
    assert_same_run(run, truth)


def test_a_damaged_best_evaluation_is_an_error_of_all_ranks(truth, command, tmp_path):
    student = truth.stages[-1]
    run = unfinished(truth, tmp_path / "damaged", student)
    weights = max(run.best(student)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")

    outcome = command(*run.arguments(), code=2).text

    assert outcome.count("megakd: error:") == 1
    assert "is damaged: the checksum of model.safetensors differs" in outcome
    assert f"remove {run.out / 'checkpoints' / student} to train the stage again" in outcome


def test_a_finished_run_started_again_prints_its_table_and_changes_nothing(truth, command):
    report = (truth.out / "report.json").read_bytes()
    before = logged(truth)

    text = command(*truth.arguments(), code=0).text

    assert f"the student is in {truth.out / 'final'}" in text
    assert "resumed" not in text
    assert (truth.out / "report.json").read_bytes() == report
    assert logged(truth) == before


@pytest.mark.parametrize("truth", [("zero3", "single")], indirect=True, ids=["single"])
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
