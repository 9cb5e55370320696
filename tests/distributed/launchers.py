"""Starts `launch/train.py` under the launchers that people use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from conftest import ROOT

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port")
DEEPSPEED = ("-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", "2", "--master_port")


def start(words: Sequence[str], variables: Mapping[str, object]) -> subprocess.Popen[str]:
    """A process of its own, with the environment of `environment`."""
    search = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment({**search, **variables}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def environment(variables: Mapping[str, object]) -> dict[str, str]:
    """The machine's environment and no launcher's, but for `variables`."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LOCAL_", "MASTER_"))
    }
    kept = {k: v for k, v in kept.items() if k not in ("RANK", "WORLD_SIZE")}
    return {**kept, **{name: str(value) for name, value in variables.items()}}
