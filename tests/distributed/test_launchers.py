"""The same file starts under every launcher, on one node or two, and ends with the same weights."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TIMEOUT_S, TRAIN, free_port, ranks_of
from tiny_runs import bert, review_task, run_in, save_tokenizer, write_jsonl

STEPS = 2
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port")
RUNNER = ("-m", "deepspeed.launcher.runner", "--quiet")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port")  # fmt: skip
DEEPSPEED = (*RUNNER, "--num_gpus", "2", "--master_port")


def start(words: Sequence[str], variables: Mapping[str, object]) -> subprocess.Popen[str]:
    """A process of its own, with the machine's environment and no launcher's but `variables`."""
    launchers = ("SLURM_", "LOCAL_", "MASTER_", "RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, *words],
        env=kept | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Dropout is on: ranks that draw alike, or draw otherwise, show in the weights."""
    folder = tmp_path_factory.mktemp("launchers")
    return run_in(
        folder,
        review_task(folder),
        teacher={"model": bert(2), "deepspeed": "teacher_zero3", "finetune": {}},
        student={"deepspeed": "zero3"},
        method={"name": "single"},
        train={"max_steps": STEPS},
        log={"logging_steps": 1},
    )


@pytest.fixture(scope="module")
def by_hand(command, config, tmp_path_factory) -> Callable[[str], Path]:
    """The student's preset -> a run of two ranks that were told what a launcher tells them."""

    @functools.cache
    def of(student: str) -> Path:
        out = tmp_path_factory.mktemp("by-hand") / "out"
        words = (f"output_dir={out}", f"student.deepspeed={student}")
        command("--config", str(config), *words, code=0)
        return out

    return of


def finish(processes: Sequence[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Exit codes and output of all processes, which are ended whatever happens."""
    try:
        text = "".join(process.communicate(timeout=TIMEOUT_S)[0] for process in processes)
        return [process.returncode for process in processes], text
    finally:
        for process in processes:
            process.kill()


def train(config: Path, out: Path) -> tuple[str, ...]:
    return (str(TRAIN), "--config", str(config), f"output_dir={out}")


def assert_finished(codes: Sequence[int], text: str, out: Path, *, ranks: int) -> None:
    """Every process ended well and rank 0 alone spoke: one table."""
    assert not any(codes), text
    assert text.count(f"the student is in {out / 'final'}") == 1, text
    assert "Traceback" not in text
    report = json.loads((out / "report.json").read_text())
    assert report["environment.ranks"] == ranks
    assert [stage["steps"] for stage in report["stages"]] == [STEPS, STEPS]


def weights(out: Path) -> bytes:
    return (out / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "launcher",
    [
        TORCHRUN,
        *(pytest.param(launcher, marks=pytest.mark.slow) for launcher in (DEEPSPEED, ACCELERATE)),
    ],
    ids=["torchrun", "deepspeed", "accelerate"],
)
def test_a_launcher_of_two_ranks_trains_as_two_ranks_by_hand(config, by_hand, tmp_path, launcher):
    out = tmp_path / "out"

    codes, text = finish([start((*launcher, str(free_port()), *train(config, out)), {})])

    assert_finished(codes, text, out, ranks=2)
    assert weights(out) == weights(by_hand("zero3"))


def slurm(rank: int, ranks: int, job: int) -> dict[str, object]:
    place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": ranks}
    nodes = {"SLURM_NODELIST": "localhost", "SLURM_STEP_NODELIST": "localhost"}
    nodes |= {"SLURM_STEP_ID": 0}
    return {"SLURM_JOB_ID": job, "SLURM_NTASKS_PER_NODE": ranks, **place, **nodes}


def job_of_a_free_port() -> int:
    """megakd meets on a port that follows from the job's number."""
    while True:
        job = random.randrange(10**6)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 20000 + job % 20000))
            return job


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [0, 1, 2], ids=["python", "srun of one", "srun of two"])
def test_processes_that_srun_starts_find_each_other_and_one_needs_no_launcher(
    config, launch, by_hand, tmp_path, tasks
):
    out, job = tmp_path / "out", job_of_a_free_port()

    ranks = [slurm(rank, tasks, job) for rank in range(tasks)] or [{}]
    group = launch(*train(config, out)[1:], ranks=ranks)

    assert_finished(group.wait(), group.text, out, ranks=len(ranks))
    assert (weights(out) == weights(by_hand("zero3"))) is (tasks == 2)


def test_a_row_that_one_rank_alone_cannot_read_is_named_by_that_rank(launch, tmp_path):
    rows = [json.dumps({"text": f"some words of text {n}"}) for n in range(60)]
    for name, lines in (("a", rows), ("b", [*rows, "{broken"])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    held = write_jsonl(tmp_path / "held.jsonl", [{"text": "words"}] * 4)
    task = {
        "type": "mlm",
        "train_files": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
        "validation_files": str(held),
        "tokenizer": str(save_tokenizer(tmp_path / "tokenizer", rows, kind="wordpiece")),
        "streaming": True,
    }

    group = launch("--config", str(run_in(tmp_path, task, train={"max_steps": 60})))

    assert group.wait() == [1, 2], group.text
    assert group.text.count("megakd: error: ") == 1, group.text
    assert f"{tmp_path / 'b.jsonl'}, line 61 is not JSON" in group.text


@pytest.mark.parametrize("worlds", [(2, 3), pytest.param((3, 2), marks=pytest.mark.slow)])
def test_nodes_that_were_started_for_different_numbers_of_ranks_end_and_say_so(
    config, launch, tmp_path, worlds
):
    ranks = [
        {**told, "LOCAL_RANK": 0, "LOCAL_SIZE": 1, "WORLD_SIZE": world}
        for told, world in zip(ranks_of(2), worlds, strict=True)
    ]
    words = (f"output_dir={tmp_path / 'out'}", "train.collective_timeout=4")

    group = launch("--config", str(config), *words, ranks=ranks)

    # Not an error of the user's: a rank may be late, and a pod is started again.
    assert group.wait() == [1, 1], group.text
    message = (
        rf"^megakd: rank {worlds.index(3)} on \S+ does not meet all of 3 ranks at .* start all"
    )
    assert re.search(message, group.text, re.MULTILINE), group.text


def hostfile(folder: Path) -> list[list[str]]:
    """The commands of DeepSpeed's launcher on each node, without ssh."""
    hosts = folder / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    meeting = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    words = [*RUNNER, "--hostfile", str(hosts), "--no_ssh"]
    return [[*words, "--node_rank", str(node), *meeting] for node in range(2)]


def rendezvous(folder: Path) -> list[list[str]]:
    del folder
    words = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    return [[*words, *meeting, "--rdzv_id", "job", "--local_addr", "127.0.0.1"]] * 2


def losses(out: Path) -> dict[tuple[str, int], float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        (line["stage"], line["step"]): line["train/loss"] for line in lines if "train/loss" in line
    }


# On one node the teacher is always sharded over all ranks.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "stage", "teacher"),
    [(hostfile, "zero2", "teacher_zero3"), (rendezvous, "zero3", "teacher_zero3_node")],
)
def test_two_nodes_give_the_losses_of_one(config, by_hand, tmp_path, launcher, stage, teacher):
    out, caches = tmp_path / "out", [tmp_path / f"cache-{node}" for node in range(2)]
    run = (*train(config, out), f"student.deepspeed={stage}", f"teacher.deepspeed={teacher}")

    codes, text = finish(
        [
            start((*words, *run), {"MEGAKD_CACHE": cache})
            for words, cache in zip(launcher(tmp_path), caches, strict=True)
        ]
    )

    assert codes == [0, 0], text
    assert losses(out) == pytest.approx(losses(by_hand(stage)))
    assert {stage for stage, _ in losses(out)} == {"teacher-finetune", "student"}


@pytest.mark.slow
def test_a_dry_run_takes_steps_on_both_ranks_beside_the_plan(config, launch, tmp_path):
    words = ("--config", str(config), "--dry_run", f"output_dir={tmp_path / 'out'}")

    group = launch(*words)

    assert group.wait() == [0, 0], group.text
    assert group.text.count("cpu, 3 steps of each stage:") == 1
    assert "Training takes about " in group.text
    assert "single: 2 ranks (CPU" in group.text
    assert list(tmp_path.iterdir()) == []


# Runs that are stopped, or whose rank dies.


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stops")
    return run_in(
        folder,
        review_task(folder),
        student={"deepspeed": "zero2"},
        train={"max_steps": 120},
        save={"save_steps": 20},
        log={"logging_steps": 1},
    )


@pytest.fixture(scope="module")
def whole(command, stopped, tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "out"
    command("--config", str(stopped), f"output_dir={out}", code=0)
    return weights(out)


@pytest.fixture
def begin(stopped, tmp_path) -> Iterator[Callable]:
    """Start a launcher of two ranks; all processes below it end with the test."""
    launchers: list[psutil.Process] = []

    def run(*launcher: str):
        words = train(stopped, tmp_path / "out")
        process = start((*launcher, str(free_port()), *words), {})
        launchers.append(psutil.Process(process.pid))
        return process

    yield run
    for launcher in launchers:
        with contextlib.suppress(psutil.Error):
            for process in (*launcher.children(recursive=True), launcher):
                process.kill()


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [DEEPSPEED, TORCHRUN], ids=["deepspeed", "torchrun"])
def test_a_run_that_is_stopped_saves_on_all_ranks_and_goes_on(
    begin, command, stopped, whole, tmp_path, launcher
):
    out, process = tmp_path / "out", begin(*launcher)
    wait_for_step(out, 3)

    # Of DeepSpeed, the process of the node below the runner.
    told = psutil.Process(process.pid)
    (told.children()[0] if launcher == DEEPSPEED else told).terminate()
    output = process.communicate(timeout=TIMEOUT_S)[0]

    assert output.count("megakd: stopped by SIGTERM, student saved at step ") == 1, output
    assert process.returncode != 0
    assert not (out / "lock.json").exists()
    ended = command(*train(stopped, out)[1:], code=0)
    assert "student: resumed at step" in ended.text
    assert weights(out) == whole


@pytest.mark.slow
def test_torchrun_brings_a_run_back_whose_rank_dies_twice(begin, whole, tmp_path):
    process = begin(*TORCHRUN[:-1], "--max-restarts", "2", TORCHRUN[-1])

    for rank, step in ((1, 30), (0, 60)):
        wait_for_step(tmp_path / "out", step)
        killed = next(
            below
            for below in psutil.Process(process.pid).children(recursive=True)
            if str(TRAIN) in below.cmdline() and below.environ().get("RANK") == str(rank)
        )
        killed.kill()
    output = process.communicate(timeout=TIMEOUT_S)[0]

    assert process.returncode == 0, output
    assert output.count("student: resumed at step") == 2, output
    assert weights(tmp_path / "out") == whole
