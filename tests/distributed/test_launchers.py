"""The same file starts under every launcher and ends with the same weights."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from conftest import TIMEOUT_S, TRAIN, free_port
from forked_ranks import start_rank
from launchers import DEEPSPEED, TORCHRUN, environment, start
from tiny_runs import bert, config_tree, write_config, write_reviews

STEPS = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Dropout is on: ranks that draw alike, or draw otherwise, show in the weights."""
    folder = tmp_path_factory.mktemp("launchers")
    task = {"type": "classification", "dataset": str(write_reviews(folder / "reviews"))}
    tree = config_tree(
        Path("unused"),
        task,
        teacher={"model": bert(2), "finetune": {}},
        student={"model": bert(1), "deepspeed": "zero3"},
        method={"name": "single"},
        log={"report_to": []},
    )
    tree["train"] |= {"max_steps": STEPS}
    return write_config(folder / "run.yaml", tree)


@pytest.fixture(scope="module")
def by_hand(launch, config, tmp_path_factory) -> Path:
    """Two ranks that were told everything a launcher tells them."""
    out = tmp_path_factory.mktemp("by-hand") / "out"
    group = launch("--config", str(config), f"output_dir={out}")
    assert group.wait() == [0, 0], group.text
    return out


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and output of every process; all are ended whatever happens."""
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
        return [(p.returncode, text) for p, text in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()


def finish_forked(
    words: Sequence[str], *places: Mapping[str, object], logs: Path
) -> list[tuple[int, str]]:
    """The same for processes that need not be started from nothing, one for each place."""
    files = [logs / f"log-{rank}.txt" for rank in range(len(places))]
    processes = [
        start_rank(words, variables=environment(place), log=file)
        for place, file in zip(places, files, strict=True)
    ]
    try:
        for process in processes:
            process.join(TIMEOUT_S)
        return [(p.exitcode, file.read_text()) for p, file in zip(processes, files, strict=True)]
    finally:
        for process in processes:
            process.kill()


def train(config: Path, out: Path) -> tuple[str, ...]:
    return (str(TRAIN), "--config", str(config), f"output_dir={out}")


def assert_finished(said: Sequence[tuple[int, str]], out: Path, *, ranks: int) -> None:
    """Every process ended well and rank 0 alone spoke: one table."""
    assert [code for code, _ in said] == [0] * len(said), said
    text = "".join(text for _, text in said)
    assert text.count(f"the student is in {out / 'final'}") == 1, text
    assert "Traceback" not in text
    report = json.loads((out / "report.json").read_text())
    assert report["environment"]["ranks"] == ranks
    assert [stage["steps"] for stage in report["stages"]] == [STEPS, STEPS]


def weights(out: Path) -> bytes:
    return (out / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("launcher", [DEEPSPEED, TORCHRUN], ids=["deepspeed", "torchrun"])
def test_a_launcher_of_two_ranks_trains_as_two_ranks_by_hand(config, by_hand, tmp_path, launcher):
    out = tmp_path / "out"

    said = finish([start((*launcher, str(free_port()), *train(config, out)), {})])

    assert_finished(said, out, ranks=2)
    assert weights(out) == weights(by_hand)


def slurm(rank: int, ranks: int, job: int = 1) -> dict[str, object]:
    """What srun sets."""
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


def test_processes_that_srun_starts_find_each_other(config, by_hand, tmp_path):
    out = tmp_path / "out"

    job = job_of_a_free_port()
    places = [slurm(rank, 2, job) for rank in range(2)]
    said = finish_forked(train(config, out), *places, logs=tmp_path)

    assert_finished(said, out, ranks=2)
    assert weights(out) == weights(by_hand)


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({}, id="python"),
        pytest.param(slurm(0, 1), id="srun", marks=pytest.mark.slow),
    ],
)
def test_one_process_needs_no_launcher(config, by_hand, tmp_path, variables):
    out = tmp_path / "out"

    said = finish([start(train(config, out), variables)])

    assert_finished(said, out, ranks=1)
    assert weights(out) != weights(by_hand)


def test_half_of_a_launchers_variables_is_an_error_that_names_the_other_half(config, tmp_path):
    half = {"RANK": 0, "WORLD_SIZE": 2}
    said = finish_forked(train(config, tmp_path / "out"), half, logs=tmp_path)

    assert said[0][0] == 2
    message = "megakd: error: RANK is set without MASTER_ADDR, MASTER_PORT; start with `deepspeed`"
    assert message in said[0][1]
    assert "Traceback" not in said[0][1]


def test_bad_input_is_said_once_and_ends_every_rank(launch, config, tmp_path):
    broken = tmp_path / "data"
    write_reviews(broken)
    with (broken / "train.jsonl").open("ab") as file:
        file.write(b'{"text": "\xff", "label": "positive"}\n')

    group = launch("--config", str(config), f"output_dir={tmp_path}/out", f"task.dataset={broken}")

    assert group.wait() == [2, 2], group.text
    assert group.text.count("megakd: error: ") == 1
    assert f"{broken / 'train.jsonl'}, line 65: text is not UTF-8 (byte 0xff" in group.text
    assert "Traceback" not in group.text
