"""The runner of the first day on a GPU: a part that fails or hangs costs only itself."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from gpu_day import agreement, cases, kernel_tests, release, runs
from gpu_day import main as gpu_day
from gpu_day.parts import PARTS, Part, grouped
from lib.launching import ROOT
from megakd.config.file import load_config

JUNIT = """<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1" time="2.5">
<testcase classname="kernels.tests.test_a" name="test_b[1]">
<failure message="one&#10;two"/></testcase>
<testcase classname="kernels.tests.test_a" name="test_c"><error message="broken"/></testcase>
<testcase classname="kernels.tests.test_a" name="test_d"/></testsuite></testsuites>"""
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print('numbers: {"steps": 1}', flush=True)
print("child", child.pid, flush=True)
time.sleep(600)
"""
WORKS = """print('numbers: {"answer": 42, "rows": [{"a": 1}]}')"""
FAILS_ONCE = """
import pathlib, sys
runs = pathlib.Path({runs!r})
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
print('numbers: {{"runs": %d}}' % len(runs.read_text()))
sys.exit("the first run fails" if len(runs.read_text()) == 1 else 0)
"""


def part(name: str, code: str, *, limit_s: float = 60) -> Part:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return Part(name, f"what {name} does", limit_s, lambda *_: command)


def start(out: Path, parts: list[Part], *words: str) -> int:
    return gpu_day.main(["--rehearse", "--out", str(out), *words], parts)


def parts_of(out: Path) -> dict[str, dict]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["parts"]


def test_without_a_gpu_or_in_the_folder_of_a_rehearsal_no_day_begins(monkeypatch, capsys, tmp_path):
    start(tmp_path, [part("works", WORKS)])
    for has_gpu, out, said in (
        (False, tmp_path / "out", "torch finds no GPU on this machine; --rehearse runs"),
        (True, tmp_path, "holds the results of a rehearsal"),
    ):
        monkeypatch.setattr(gpu_day, "has_gpu", lambda has_gpu=has_gpu: has_gpu)
        assert gpu_day.main(["--out", str(out)], [part("works", WORKS)]) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_part_that_hangs_is_ended_at_its_limit_and_those_beside_it_end_each_by_itself(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(gpu_day, "has_gpu", lambda: True)
    waits = part("release", f"import time; time.sleep(1); {WORKS}")
    parts = [part("kernel-tests", HANGS, limit_s=3), waits, part("agreement", WORKS)]

    code = gpu_day.main(["--out", str(tmp_path)], parts)

    result = parts_of(tmp_path)
    assert code == 1
    assert [(name, one["state"]) for name, one in result.items()] == [
        ("agreement", "finished"), ("release", "finished"), ("kernel-tests", "timed out")
    ]  # fmt: skip
    hangs = result["kernel-tests"]
    assert hangs["seconds"] < 10
    assert hangs["reason"] == "ended at its limit of 3 s"
    assert hangs["numbers"] == {"steps": 1}
    assert "Fatal Python error: Aborted" in hangs["tail"]
    # Nothing of the part is left.
    log = (tmp_path / "logs/kernel-tests.log").read_text(encoding="utf-8")
    child = next(int(line.split()[1]) for line in log.splitlines() if line.startswith("child"))
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


def test_a_failed_part_is_tried_again_and_a_finished_part_is_not(tmp_path, capsys):
    fails = part("fails", FAILS_ONCE.format(runs=str(tmp_path / "runs")))

    assert start(tmp_path, [fails]) == 1
    failed = parts_of(tmp_path)["fails"]
    assert start(tmp_path, [fails]) == 0
    assert start(tmp_path, [fails]) == 0

    assert (failed["state"], failed["reason"]) == ("failed", "exit code 1")
    assert "the first run fails" in failed["tail"]
    assert parts_of(tmp_path)["fails"]["numbers"] == {"runs": 2}
    assert "fails: has finished before" in capsys.readouterr().out


def test_a_part_that_does_not_fit_into_the_time_or_cannot_run_here_is_listed_with_why(tmp_path):
    long, short = part("long", WORKS, limit_s=600), part("short", WORKS, limit_s=20)
    skips = part("skips", "print('skipped: triton is not installed')", limit_s=20)

    assert start(tmp_path, [long, skips, short], "--minutes", "1") == 1

    result = parts_of(tmp_path)
    states = {name: one["state"] for name, one in result.items()}
    assert states == {"long": "not run", "skips": "skipped", "short": "finished"}
    assert result["long"]["reason"].startswith("the limit of 600 s does not fit into the last")
    assert result["skips"]["reason"] == "triton is not installed"


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_part_is_a_program_and_every_run_a_valid_config(tmp_path, rehearse):
    for one in PARTS:
        command = one.command(tmp_path, rehearse)
        assert callable(importlib.import_module(command[3]).main)
        assert ("--rehearse" in command) == rehearse
    for name in ("causal_lm", "minidisc", "billion", "llama", "smollm2"):
        tree = getattr(cases, f"{name}_tree")
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(tree(tmp_path, rehearse=rehearse)), encoding="utf-8")
        assert Path(load_config(path).task.dataset).is_dir()


def test_failures_of_kernel_tests_are_listed_with_the_first_line_of_the_message(tmp_path):
    (tmp_path / "report.xml").write_text(JUNIT, encoding="utf-8")

    counts, failures = kernel_tests.read_junit(tmp_path / "report.xml")

    assert counts == {"passed": 1, "failed": 2, "skipped": 1, "seconds": 2.5}
    told = [("test_a::test_b[1]", "one"), ("test_a::test_c", "broken")]
    assert [(one["test"], one["message"]) for one in failures] == told


def test_an_error_that_is_large_or_no_number_does_not_hold():
    nan = float("nan")
    for errors, holds in (((1e-6, None), True), ((1e-3, 1e-3), False), ((1e-6, nan), False)):
        row = dict(zip(("triton loss", "triton dw"), errors, strict=True)) | {"triton dx": 1e-3}
        assert agreement.is_small(row, "bf16") == holds


def test_weights_of_other_bits_are_found_and_a_checkpoint_being_written_does_not_count(tmp_path):
    for name, value in (("one", 1.0), ("other", 1.5)):
        (tmp_path / name / "final").mkdir(parents=True)
        save_file({"w": torch.tensor([0.0, value])}, tmp_path / name / "final/model.safetensors")
    for name in ("step-10", "step-20.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checksums.json").touch()

    result = runs.differences(tmp_path / "one", tmp_path / "other")

    assert result == {"same bits": False, "largest difference of a weight": 0.5}
    assert runs.differences(tmp_path / "one", tmp_path / "one")["same bits"]
    assert (runs.newest_step(tmp_path), runs.newest_step(tmp_path / "absent")) == (10, 0)


def test_memory_that_is_left_on_a_gpu_or_a_model_that_is_left_is_a_failure():
    failures = [("cuda", 5, 0), ("cuda", 0, 1)]
    for device, left_mb, models in (*failures, ("cuda", 0, 0), ("cpu", 500, 0)):
        row = {"before": 100.0, "after collecting": 167.0, "models left": models}
        last = {**row, "after collecting": 167.0 + left_mb}
        holds = release.is_released([row, last], torch.device(device))
        assert holds == ((device, left_mb, models) not in failures)


@pytest.mark.slow
def test_all_parts_can_be_rehearsed_as_a_user_does(tmp_path):
    command = [sys.executable, "benchmarks/gpu_day.py", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    result = parts_of(tmp_path)
    assert not {n: one["tail"] for n, one in result.items() if one["state"] != "finished"}
    assert done.returncode == 0, done.stderr
    assert {*result} == {part.name for part in PARTS}
    for name, steps in (("causal-lm", 60), ("minidisc", 40), ("billion", 8)):
        numbers = result[name]["numbers"]
        assert steps / 2 <= numbers["killed after step"] < steps
        assert numbers["same bits"]
        assert {leg["run"] for leg in numbers["seconds"]} == {"first", "killed", "resumed"}
    raced = {row["entrant"]: row for row in result["race"]["numbers"]["rows"]}
    assert all(raced[name]["tokens/s"] > 0 for name in ("megakd", "loop", "compiled"))
    assert {row["phase"] for row in result["billion"]["numbers"]["plan"]} >= {"trial-1"}
    assert "no CUDA kernels" in result["llama"]["numbers"]["kernels"]
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "## llama: finished" in page
    assert "without clocks" in page


def test_only_what_is_not_timed_runs_side_by_side():
    groups = [[part.name for part in group] for group in grouped(PARTS)]

    assert ["kernel-tests", "agreement", "causal-lm", "minidisc", "release"] in groups
    assert sum(len(group) == 1 for group in groups) == len(groups) - 1
    assert sum(len(group) for group in groups) == len(PARTS)
