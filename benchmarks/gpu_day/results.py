"""Results of `gpu_day.py`: the machine, what happened to every part, and the page of both.

On the page, the numbers of a part are values, which become one table, and lists of rows, which
become a table each.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lib.launching import ROOT, UnusableError
from lib.tables import machine, markdown_table

NOTE = (
    "**A rehearsal**: tiny sizes on a CPU. The numbers show that the parts run, and say nothing "
    "about a GPU."
)
PACKAGES = ("torch", "triton", "deepspeed", "transformers")
ASKED = {
    "name": "GPU", "driver_version": "driver", "memory.total": "memory",
    "clocks.sm": "SM clock now", "clocks.mem": "memory clock now",
    "clocks.max.sm": "SM clock at most", "clocks.max.mem": "memory clock at most",
    "power.limit": "power limit", "temperature.gpu": "temperature (C)",
}  # fmt: skip
"""In the order in which nvidia-smi prints them."""


def read_results(path: Path, *, rehearsal: bool) -> dict[str, Any]:
    """Return `rehearsal`, `machine` and the outcomes of `parts` by name.

    Raises:
        UnusableError: the file holds a rehearsal and this is none, or the other way.
    """
    tree: dict[str, Any] = {"rehearsal": rehearsal, "machine": {}, "parts": {}}
    if path.is_file():
        tree = json.loads(path.read_text(encoding="utf-8"))
    if tree["rehearsal"] != rehearsal:
        kinds = ("a run on a GPU", "a rehearsal")
        raise UnusableError(
            f"{path} holds the results of {kinds[tree['rehearsal']]}, and this is "
            f"{kinds[rehearsal]}; choose another --out"
        )
    return tree


def describe(*, rehearsal: bool) -> dict[str, str]:
    gpus = {"GPU": "none: rehearsal on a CPU, without clocks"} if rehearsal else _gpus()
    # The distribution that is imported, where two are installed.
    first = {name: next(iter(metadata.distributions(name=name)), None) for name in PACKAGES}
    versions = {
        name: "not installed" if one is None else one.version for name, one in first.items()
    }
    commit = _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty= with changes"])
    return {**gpus, "CPU": machine(), **versions, "commit": commit or "unknown"}


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
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def page_of(results: Mapping[str, Any]) -> str:
    parts = results["parts"]
    overview = [
        {"part": name, **{key: outcome[key] for key in ("state", "seconds", "about", "reason")}}
        for name, outcome in parts.items()
    ]
    blocks = ["# First day on a GPU", NOTE if results["rehearsal"] else "", "## Machine"]
    blocks += [*_tables(results["machine"]), "## Parts", markdown_table(overview)]
    for name, outcome in parts.items():
        blocks += [f"## {name}: {outcome['state']}", outcome["about"], outcome["reason"]]
        blocks += _tables(outcome["numbers"])
        # The end of the output of a part that has failed.
        blocks += [f"```text\n{outcome['tail']}\n```"] if outcome["tail"] else []
    return "\n\n".join(filter(None, blocks)) + "\n"


def _tables(numbers: Mapping[str, Any]) -> list[str]:
    values = [{"what": k, "value": v} for k, v in numbers.items() if not isinstance(v, list)]
    blocks = [markdown_table(values)] if values else []
    for title, rows in numbers.items():
        if isinstance(rows, list) and rows:
            blocks += [f"### {title}", markdown_table(rows)]
    return blocks
