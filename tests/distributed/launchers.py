"""Starts `launch/train.py` under the launchers that people use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from conftest import ROOT

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port")
RUNNER = ("-m", "deepspeed.launcher.runner", "--quiet")
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
