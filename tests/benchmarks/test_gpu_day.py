"""The runner of the first day on a GPU: a part that fails or hangs costs only itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_day  # noqa: E402
import gpu_day_machine  # noqa: E402
import gpu_day_page  # noqa: E402
import gpu_day_process  # noqa: E402
from gpu_day_parts import Part  # noqa: E402

HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print('numbers: {"found": 1}', flush=True)
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
    return Part(name, f"what {name} does", limit_s, lambda _: command)


def start(out: Path, parts: list[Part], *words: str) -> int:
    return gpu_day.main(["--rehearse", "--out", str(out), *words], parts)


def parts_of(out: Path) -> dict[str, dict]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["parts"]


def test_without_a_gpu_the_command_says_so_and_ends(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_day, "has_gpu", lambda: False)

    code = gpu_day.main(["--out", str(tmp_path / "out")], [part("works", WORKS)])

    assert code == 1
    assert "torch finds no GPU on this machine; --rehearse runs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_an_installed_megakd_the_command_says_how_to_install_it(tmp_path):
    command = [sys.executable, "-S", str(ROOT / "benchmarks" / "gpu_day.py"), "--rehearse"]

    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert ended.returncode == 1
    assert ended.stderr.startswith("gpu_day: error: this Python has no megakd; install the")


def test_a_part_that_hangs_is_ended_at_its_limit_and_the_others_still_run(tmp_path):
    began = time.monotonic()

    code = start(tmp_path, [part("hangs", HANGS, limit_s=1.5), part("works", WORKS)])

    assert code == 1
    assert time.monotonic() - began < 60
    found = parts_of(tmp_path)
    assert found["hangs"]["state"] == "timed out"
    assert found["hangs"]["reason"] == "ended at its limit of 1.5 s"
    assert found["hangs"]["numbers"] == {"found": 1}
    assert "Fatal Python error: Aborted" in found["hangs"]["tail"]
    assert found["works"]["state"] == "finished"
    # Nothing of the part is left.
    log = (tmp_path / "logs" / "hangs.log").read_text(encoding="utf-8")
    child = next(int(line.split()[1]) for line in log.splitlines() if line.startswith("child"))
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


def test_a_failed_part_is_tried_again_and_a_finished_part_is_not(tmp_path):
    fails = part("fails", FAILS_ONCE.format(runs=str(tmp_path / "runs")))

    assert start(tmp_path, [fails]) == 1
    failed = parts_of(tmp_path)["fails"]
    assert start(tmp_path, [fails]) == 0
    assert start(tmp_path, [fails]) == 0

    assert failed["state"] == "failed"
    assert failed["reason"] == "exit code 1"
    assert "the first run fails" in failed["tail"]
    assert parts_of(tmp_path)["fails"]["numbers"] == {"runs": 2}


def test_a_finished_part_is_repeated_if_it_is_named(tmp_path):
    counts = part("counts", FAILS_ONCE.format(runs=str(tmp_path / "runs")))
    start(tmp_path, [counts])
    start(tmp_path, [counts])

    start(tmp_path, [counts, part("works", WORKS)], "--parts", "works", "--again", "counts")

    assert parts_of(tmp_path)["counts"]["numbers"] == {"runs": 3}


def test_a_part_that_does_not_fit_into_the_time_is_listed_as_not_run(tmp_path):
    long, short = part("long", WORKS, limit_s=600), part("short", WORKS, limit_s=20)

    code = start(tmp_path, [long, short], "--minutes", "1")

    assert code == 1
    found = parts_of(tmp_path)
    assert found["long"]["state"] == "not run"
    assert found["long"]["reason"].startswith("the limit of 600 s does not fit into the last")
    assert found["short"]["state"] == "finished"


def test_a_part_that_this_machine_cannot_run_is_skipped_with_its_reason(tmp_path):
    skips = part("skips", "print('skipped: triton is not installed')")

    code = start(tmp_path, [skips])

    assert code == 0
    assert parts_of(tmp_path)["skips"]["state"] == "skipped"
    assert parts_of(tmp_path)["skips"]["reason"] == "triton is not installed"


def test_the_page_has_every_part_also_one_that_was_not_asked_for(tmp_path):
    start(tmp_path, [part("works", WORKS), part("other", WORKS)], "--parts", "works")

    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "**A rehearsal**" in page
    assert "| works | finished |" in page
    assert "| other | not run |" in page
    assert "| answer | 42 |" in page
    assert "### rows\n\n| a |\n| --- |\n| 1 |" in page


def test_a_rehearsal_is_not_continued_on_a_gpu(monkeypatch, capsys, tmp_path):
    start(tmp_path, [part("works", WORKS)])
    monkeypatch.setattr(gpu_day, "has_gpu", lambda: True)

    code = gpu_day.main(["--out", str(tmp_path)], [part("works", WORKS)])

    assert code == 1
    assert "holds the results of a rehearsal" in capsys.readouterr().err


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_day.parse(["--parts", "bench,benhc"])

    assert "'benhc' is none of kernel-tests, agreement" in capsys.readouterr().err


def test_numbers_of_which_the_last_line_was_cut_are_left_out():
    assert gpu_day_process.numbers_of('numbers: {"a": 1}\nnumbers: {"a": 2}\n') == {"a": 2}
    assert gpu_day_process.numbers_of('numbers: {"a": 1}\nnumbers: {"a"') == {}
    assert gpu_day_process.numbers_of("nothing") == {}


def test_a_cell_keeps_its_table_whole():
    table = gpu_day_page.markdown_table([{"a": "x|y\nz", "b": None}, {"a": True, "c": 0.123456}])

    assert table.splitlines()[2:] == ["| x\\|y z |  |  |", "| yes |  | 0.1235 |"]


def test_the_machine_has_the_clocks_as_nvidia_smi_prints_them(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    answers = "NVIDIA H200, 580.159.04, 143771 MiB, 345 MHz, 3201 MHz, 1980 MHz, 3201 MHz"
    program.write_text(f"#!/bin/sh\necho '{answers}, 700.00 W, 31'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    found = gpu_day_machine.describe(rehearsal=False)

    assert found["GPU"] == "NVIDIA H200"
    assert found["driver"] == "580.159.04"
    assert found["SM clock now"] == "345 MHz"
    assert found["temperature (C)"] == "31"
    # Only some builds have their tag in both versions.
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
