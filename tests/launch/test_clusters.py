"""Scripts for clusters at the end of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ENDS = {
    "change": "sys.exit(2) if rank else time.sleep(60)",  # the launcher ends the other rank
    "lost": "os.kill(os.getpid(), 9) if rank else time.sleep(60)",
}


@pytest.mark.parametrize("end", [2, 138])
def test_a_slurm_job_is_requeued_if_its_time_limit_stopped_it(repository, tmp_path, end):
    programs = {"srun": f"exit {end}", "scontrol": f'echo "$@" >> {tmp_path}/asked'}
    for name, lines in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node-1", "SLURM_CPUS_PER_TASK": "2"}
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])

    words = ["bash", "launch/slurm.sbatch", "run.yaml"]
    ended = subprocess.run(words, cwd=repository, env={**job, "PATH": path}, check=False)

    assert ended.returncode == end
    assert ("requeue 41" in (tmp_path / "asked").read_text()) is (end == 138)


@pytest.mark.parametrize(("end", "code"), [("change", 2), ("lost", 138)])
def test_a_pod_says_whether_it_is_worth_starting_again(repository, tmp_path, end, code):
    script = tmp_path / "rank.py"
    script.write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\n{ENDS[end]}\n")
    words = ["launch/pod.py", "--standalone", "--nproc_per_node", "2", str(script)]

    run = subprocess.run([sys.executable, *words], cwd=repository, capture_output=True, check=False)

    assert run.returncode == code, run.stderr


def test_pods_are_started_again_unless_something_has_to_be_changed(repository: Path) -> None:
    text = (repository / "launch" / "kubernetes.yaml").read_text()
    runtime, job = yaml.safe_load_all(text)

    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pods = node["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "launch/pod.py", "launch/train.py"]
    assert container["resources"]["requests"]["memory"]
    (rule,) = pods["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
