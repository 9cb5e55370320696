"""One rank without a process group, and a cache of its own, for all tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGAKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
