"""The launchers above this process. A launched rank ends when one of its launchers ends."""

from __future__ import annotations

import os
from pathlib import PurePath

import psutil

PROGRAMS = ("deepspeed", "torchrun", "mpirun", "mpiexec", "orted", "prted", "hydra_pmi_proxy")
MODULES = ("deepspeed.launcher.", "torch.distributed.run", "torch.distributed.launch")
FILES = ("deepspeed/launcher/launch.py", "torch/distributed/run.py", "torch/distributed/launch.py")
SLURM = "slurmstepd"
RANK_VARIABLES = ("RANK", "SLURM_PROCID")
# Only DeepSpeed's launcher sets the first variable, and only torchrun sets the second.
LAUNCHER_VARIABLES = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")


class Launchers:
    """The chain of processes from a rank up to its outermost launcher on this host.

    The chain of `deepspeed` has two processes: the runner and the launcher of the node. A process
    that was not started by a launcher has an empty chain and is never ended this way, not even
    when its shell ends.
    """

    def __init__(self) -> None:
        is_rank = any(name in os.environ for name in RANK_VARIABLES)
        self.chain = _up_to_launcher(psutil.Process().parents()) if is_rank else []
        # A launcher that was killed while this rank started is no longer a parent.
        is_launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
        self._was_gone = is_launched and not self.chain and os.getppid() == 1

    def have_ended(self) -> bool:
        """Return true if any process of the chain has ended."""
        return self._was_gone or not all(map(_is_alive, self.chain))


def _up_to_launcher(parents: list[psutil.Process]) -> list[psutil.Process]:
    launchers = [is_launcher(process) for process in parents]
    if True not in launchers:
        return []
    nearest = launchers.index(True)
    following = launchers[nearest:]
    count = following.index(False) if False in following else len(following)
    return parents[: nearest + count]


def is_launcher(process: psutil.Process) -> bool:
    """Return true if a process is a program that starts ranks."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    if not words:
        return False
    program = PurePath(words[0]).name
    if program.startswith(SLURM):
        return True
    shown = words[:1] if not program.startswith("python") else words[1:6]
    return any(_names_launcher(word) for word in shown)


def _names_launcher(word: str) -> bool:
    is_program = PurePath(word).name in PROGRAMS
    return is_program or word.startswith(MODULES) or word.endswith(FILES)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
