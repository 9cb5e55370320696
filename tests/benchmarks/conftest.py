"""The benchmarks import each other from their folder, and run as commands of `benchmarks`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks/evidence/plugins")]


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Start a benchmark as its users do."""

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "benchmarks", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    return start


@pytest.fixture
def load() -> Callable[..., dict]:
    """Return the configs of legs by name."""
    from megakd.config.file import load_config

    def configs(legs) -> dict:
        return {
            leg.name: load_config(leg.config, [*leg.overrides, f"output_dir={leg.output}"])
            for leg in legs
        }

    return configs
