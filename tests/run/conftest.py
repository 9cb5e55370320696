"""The finished whole run, and a run to be spoiled in one place."""

from __future__ import annotations

from pathlib import Path

import pytest
from spoiling import Bench


@pytest.fixture
def bench(whole_run, tmp_path, one_rank) -> Bench:
    return Bench(tmp_path, whole_run.reviews, whole_run.teacher, one_rank)


@pytest.fixture
def out(whole_run) -> Path:
    return whole_run.out


@pytest.fixture
def config(whole_run) -> Path:
    return whole_run.config
