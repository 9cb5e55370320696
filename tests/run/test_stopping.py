"""A run that is told to stop, gets more steps or fails: what is saved, and where it goes on."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked_ranks import start_rank
from one_rank import Outcome
from tiny_runs import bert, review_task, run_in
from whole_run import finish, read, records, same_weights

from megakd.config.run import SaveConfig

STEPS = 8
# What does not depend on how long things take.
LOSS, SCORE = "train/loss", "eval/accuracy"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Logs, evaluates and saves at steps that no stop in this file falls on."""
    folder = tmp_path_factory.mktemp("stopping")
    sections = {"train": {"max_steps": STEPS}, "save": {"save_steps": 7}}
    return run_in(folder, review_task(folder), eval={"eval_steps": 4}, **sections)


@pytest.fixture(scope="module")
def truth(one_rank, config, tmp_path_factory) -> Path:
    """The run without a stop, which saves where its config says."""
    out = tmp_path_factory.mktemp("truth") / "out"
    finish(one_rank, config, f"output_dir={out}")
    assert saved(out) == {"step-7", f"step-{STEPS}"}
    return out


def logged(out: Path) -> list[dict[str, Any]]:
    kept = ("step", LOSS, SCORE)
    return [{k: r[k] for k in kept if k in r} for r in records(out, "student")]


def saved(out: Path) -> set[str]:
    return {path.name for path in (out / "checkpoints" / "student").glob("step-*")}


@pytest.mark.parametrize(
    ("stop", "at"),
    [
        # The evaluation of step 4 comes before the checkpoint: a resumed run does not repeat it.
        pytest.param(3, 4, id="where an evaluation is due"),
        pytest.param(STEPS, STEPS, id="after the last step"),
    ],
)
def test_a_stopped_run_saves_once_and_ends_as_if_it_had_never_been_stopped(
    one_rank, config, truth, tmp_path, stop, at
):
    out = tmp_path / "out"

    outcome = one_rank.train("--config", config, f"output_dir={out}", stop_at=("student", stop))

    assert outcome.code == 143, outcome.err
    assert outcome.err.splitlines()[-1] == (
        f"megakd: stopped by SIGTERM, student saved at step {at}; start the same command again "
        "to continue"
    )
    assert f"step-{at}" in saved(out)
    assert not (out / "report.json").exists()
    assert not (out / "lock.json").exists()
    outcome = finish(one_rank, config, f"output_dir={out}")
    assert f"student: resumed at step {at} from" in outcome.err
    assert same_weights(out / "final", truth / "final")
    assert logged(out) == logged(truth)


# A finished run that is started again with more steps goes on where it ended.


@pytest.fixture
def start(bench) -> Callable[..., Outcome]:
    """Start a run that saves at every step: `start(output folder, settings of training)`."""

    def run(out: str, train: dict[str, Any], **sections: Any) -> Outcome:
        constant = {"lr_scheduler_type": "constant", "max_steps": None, **train}
        save = {"save_steps": 1, "save_total_limit": 2, "keep": True, **(sections.pop("save", {}))}
        tree = bench.tree(train=constant, save=save, **sections)
        return bench.start(tree, f"output_dir={bench.folder / out}")

    return run


def test_a_longer_run_has_the_weights_of_one_that_was_as_long_from_the_start(start, bench):
    alone, key = {"baselines": ["alone"]}, "num_train_epochs"
    start("whole", {"max_steps": 6}, **alone)
    assert start("out", {key: 0.1875}, **alone).code == 0
    saved = (bench.folder / "out" / "checkpoints" / "student").glob("step-*")
    assert [path.name for path in saved] == ["step-3"]

    outcome = start("out", {key: 0.375}, **alone)

    assert outcome.code == 0, outcome.err
    assert "student: finished with 3 steps and continues" in outcome.err
    assert f"{key}: 0.1875 there, 0.375 here" in outcome.err
    steps = {stage["name"]: stage["steps"] for stage in read(bench.folder / "out")["stages"]}
    assert steps == {"student": 6, "alone": 6}
    assert same_weights(*(bench.folder / out / "final" for out in ("whole", "out")))


@pytest.mark.parametrize(("minutes", "steps"), [(1e-9, [1, 2, 3]), (None, [3])])
def test_a_run_saves_by_minutes_and_says_when_a_checkpoint_is_whole(start, bench, minutes, steps):
    save = {"save_steps": None, "save_minutes": minutes, "save_total_limit": None}

    outcome = start(f"minutes-{minutes}", {"max_steps": 3}, save=save)

    folder = bench.folder / f"minutes-{minutes}" / "checkpoints" / "student"
    assert sorted(path.name for path in folder.glob("step-*")) == [f"step-{n}" for n in steps]
    for step in steps:
        assert f"the checkpoint of step {step} in {folder} is whole" in outcome.err


@pytest.mark.parametrize(
    ("keys", "seconds"),
    [({}, 300), ({"save_steps": 9}, math.inf), ({"save_steps": 9, "save_minutes": 2}, 120)],
)
def test_minutes_count_unless_steps_alone_are_set(keys, seconds):
    assert SaveConfig(**keys).seconds == seconds


def test_a_finished_run_whose_checkpoints_were_removed_gets_no_more_steps(start, bench):
    gone = {"save": {"keep": False}}
    start("out", {"max_steps": 3}, **gone)
    assert not (bench.folder / "out" / "checkpoints" / "student").exists()

    outcome = start("out", {"max_steps": 4}, **gone)

    assert outcome.code == 2
    assert "stages/student has finished, and its checkpoints were removed" in outcome.err
    assert "train it again with save.keep=true" in outcome.err


def test_fewer_steps_are_refused_and_change_nothing(start, bench):
    start("out", {"max_steps": 3})
    student = bench.folder / "out" / "final" / "model.safetensors"
    before = student.read_bytes()

    outcome = start("out", {"max_steps": 2})

    assert outcome.code == 2
    assert "max_steps: 3 there, 2 here" in outcome.err
    assert student.read_bytes() == before


def test_a_stage_that_others_were_made_from_does_not_go_on(start, bench):
    teacher = {"teacher": {"model": bert(2), "finetune": {}}}
    start("out", {"max_steps": 2}, **teacher)
    # No start reads its checkpoints again: its model is in stages/.
    assert not (bench.folder / "out" / "checkpoints" / "teacher-finetune").exists()

    outcome = start("out", {"max_steps": 4}, **teacher)

    assert outcome.code == 2
    assert "teacher-finetune" in outcome.err
    assert "max_steps: 2 there, 4 here" in outcome.err


# A rank that fails tells why and ends, also where its process group can never be left.

# As NCCL's while another rank waits in a collective: leaving the group waits for ever.
SCRIPT = """
import sys, time
import torch.distributed as dist
from megakd import cli
from megakd.engine import distributed
from megakd.errors import MegakdError

class Waiting(dist.ProcessGroup):
    def getBackendName(self):
        return "waiting"
    def shutdown(self):
        time.sleep(3600)

def join(store, rank, size, timeout):
    return Waiting(rank, size)

dist.Backend.register_backend("waiting", join, devices=["cpu"])
dist.init_process_group("waiting", rank=0, world_size=1, store=dist.HashStore())

def command():
    try:
        raise {error}
    except Exception as error:
        distributed.stop(failure=error)
        raise

def call():
    distributed.keep_group()
    raise {error}

{how}
"""


@pytest.mark.parametrize(
    ("how", "error", "code", "told"),
    [
        ("sys.exit(cli._guarded(command))", "MegakdError('of the user')", 2, "error: of the user"),
        ("call()", "RuntimeError('CUDA')", 1, "RuntimeError: CUDA"),
    ],
    ids=["command", "python"],
)
def test_a_failed_rank_ends_without_waiting_for_the_others(tmp_path, how, error, code, told):
    program, log = tmp_path / "rank.py", tmp_path / "log"
    program.write_text(SCRIPT.format(error=error, how=how))

    rank = start_rank([str(program)], variables=os.environ, log=log)
    rank.join(timeout=240)

    assert rank.exitcode == code
    assert told in log.read_text()
