"""Results of `gpu_day.py`: the machine, what happened to every part, and the page of both.

`results.json` is whole after every part. On the page, the numbers of a part are values, which
become one table, and lists of rows, which become a table each.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from lib.launching import ROOT, UnusableError
from lib.tables import machine, markdown_table
from megakd.storage.atomic import write_json

NOTE = (
    "**A rehearsal**: tiny sizes on a CPU. The numbers show that the parts run, and say nothing "
    "about a GPU."
)
State = Literal["finished", "failed", "timed out", "skipped", "not run"]
FINISHED: State = "finished"
DONE = (FINISHED, "skipped")
"""States without a problem; a part that was skipped is tried again all the same."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a part: why it has not finished, and the end of its output in this case."""

    state: State
    about: str
    reason: str = ""
    seconds: float = 0.0
    numbers: Mapping[str, Any] = field(default_factory=dict)
    tail: str = ""


class Results:
    """The machine and the outcomes of a folder; `results.json` is whole after every `write`."""

    def __init__(self, folder: Path, *, rehearsal: bool) -> None:
        self._path, self._rehearsal = folder / "results.json", rehearsal
        tree: dict[str, Any] = {"rehearsal": rehearsal, "machine": {}, "parts": {}}
        if self._path.is_file():
            tree = json.loads(self._path.read_text(encoding="utf-8"))
        if tree["rehearsal"] != rehearsal:
            kinds = ("a run on a GPU", "a rehearsal")
            raise UnusableError(
                f"{self._path} holds the results of {kinds[tree['rehearsal']]}, and this is "
                f"{kinds[rehearsal]}; choose another --out"
            )
        self.machine: dict[str, Any] = tree["machine"]
        self.parts = {name: Outcome(**outcome) for name, outcome in tree["parts"].items()}

    def is_finished(self, name: str) -> bool:
        return name in self.parts and self.parts[name].state == FINISHED

    def write(self) -> None:
        parts = {name: asdict(outcome) for name, outcome in self.parts.items()}
        tree = {"rehearsal": self._rehearsal, "machine": self.machine, "parts": parts}
        write_json(self._path, tree)


PACKAGES = ("torch", "triton", "deepspeed", "transformers")
ASKED = {
    "name": "GPU", "driver_version": "driver", "memory.total": "memory",
    "clocks.sm": "SM clock now", "clocks.mem": "memory clock now",
    "clocks.max.sm": "SM clock at most", "clocks.max.mem": "memory clock at most",
    "power.limit": "power limit", "temperature.gpu": "temperature (C)",
}  # fmt: skip
"""In the order in which nvidia-smi prints them."""


def has_gpu() -> bool:
    import torch  # takes seconds, and a rehearsal does not ask

    return torch.cuda.is_available()


def describe(*, rehearsal: bool) -> dict[str, str]:
    gpus = {"GPU": "none: rehearsal on a CPU, without clocks"} if rehearsal else _gpus()
    # The distribution that is imported, where two are installed.
    first = {name: next(iter(metadata.distributions(name=name)), None) for name in PACKAGES}
    versions = {
        name: "not installed" if one is None else one.version for name, one in first.items()
    }
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]) or "unknown"
    status = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]
    is_changed = commit != "unknown" and _output(status)
    commit += " with changes" if is_changed else ""
    return {**gpus, "CPU": machine(), **versions, "commit": commit}


def _gpus() -> dict[str, str]:
    query = [f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    lines = _output(["nvidia-smi", *query]).splitlines()
    if not lines:
        return {"GPU": "nvidia-smi does not answer: name and clocks are unknown"}
    answers = [answer.strip() for answer in lines[0].split(",")]
    return {**dict(zip(ASKED.values(), answers, strict=False)), "GPUs": str(len(lines))}


def _output(command: Sequence[str]) -> str:
    """Return what a program prints; empty if the program is missing or fails."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def page_of(results: Results, abouts: Mapping[str, str], *, rehearsal: bool) -> str:
    parts = results.parts
    abouts = {**abouts, **{name: outcome.about for name, outcome in parts.items()}}
    absent = Outcome(state="not run", about="")
    overview = [
        {
            "part": name,
            "state": (outcome := parts.get(name, absent)).state,
            "seconds": round(outcome.seconds) if name in parts else None,
            "what": about,
            "reason": outcome.reason,
        }
        for name, about in abouts.items()
    ]
    blocks = ["# First day on a GPU", *([NOTE] if rehearsal else []), "## Machine"]
    blocks += [*_tables(results.machine), "## Parts", markdown_table(overview)]
    for name in (name for name in abouts if name in parts):
        outcome = parts[name]
        blocks += [
            f"## {name}: {outcome.state}",
            outcome.about,
            outcome.reason,
            *_tables(outcome.numbers),
        ]
        # The end of the output of a part that has failed.
        blocks += [f"```text\n{outcome.tail}\n```"] if outcome.tail else []
    return "\n\n".join(filter(None, blocks)) + "\n"


def _tables(numbers: Mapping[str, Any]) -> list[str]:
    values = [{"what": k, "value": v} for k, v in numbers.items() if not isinstance(v, list)]
    blocks = [markdown_table(values)] if values else []
    for title, rows in numbers.items():
        if isinstance(rows, list) and rows:
            blocks += [f"### {title}", markdown_table(rows)]
    return blocks
