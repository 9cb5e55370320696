"""Runs of a benchmark, each in a folder of its own: gone on with where it was, done once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from launching import ROOT, trained

if TYPE_CHECKING:
    from pathlib import Path


class Leg(NamedTuple):
    """One run: its YAML file, the folder it writes, and what wins over the file."""

    name: str
    config: Path
    output: Path
    overrides: tuple[str, ...]


def report_of(leg: Leg, *, ranks: int, jobs: int = 1) -> dict[str, Any]:
    """The report of a leg, one of `jobs` side by side: it is done, gone on with, or started."""
    report = finished(leg)
    if report is None:
        print(f"{leg.output}:", flush=True)
        report = trained(leg.config, leg.output, ranks=ranks, overrides=leg.overrides, jobs=jobs)
    return report


def finished(leg: Leg) -> dict[str, Any] | None:
    """The report of a leg that is done.

    Raises:
        MegakdError: the folder holds a run of other settings.
    """
    from megakd.config.file import load_config
    from megakd.run.finished_run import is_finished

    output = ROOT / leg.output
    config = load_config(ROOT / leg.config, [*leg.overrides, f"output_dir={output}"])
    if not is_finished(config):
        return None
    return json.loads((output / "report.json").read_text(encoding="utf-8"))
