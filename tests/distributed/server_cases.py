"""Pushes to inference servers and exports of equal weights, on gloo ranks."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

from cases import started

from megakd.engine import distributed
from megakd.errors import MegakdError
from megakd.models.learned import Learned
from megakd.servers.connect import AdapterPush, FullPush
from megakd.servers.http import JsonServer
from megakd.servers.sglang import SglangServer
from megakd.servers.vllm import VllmServer, VllmWeightServer
from megakd.training.stage_folder import consume, write_stage_folder


def full(
    config_path: str, overrides: list[str], folder: str, kind: str, urls: list[str]
) -> str | None:
    """Two updates of the student with a push after each, then the export; the pushed version."""
    server = VllmWeightServer if kind == "vllm" else SglangServer
    servers = [server(JsonServer(url, time_limit_s=60)) for url in urls]
    with started(config_path, overrides) as (run, _):
        student = run.student.student
        push = FullPush(student, servers, Path(folder) / "run" / "run-s1")
        with patch("megakd.servers.connect.SHARD_BYTES", 3000):
            for version in (1, 2):
                run.trainer.train_step(run.source.step(version - 1))
                pushed = push.push(version)
        models = {"student": Learned.of(student, None)}
        if distributed.ranks().is_main:
            write_stage_folder(Path(folder) / "export", models, extra={})
        else:
            consume(models, None)
    return pushed.weights


def refused(config_path: str, overrides: list[str], folder: str, urls: list[str]) -> list[str]:
    """The messages of a folder without room and of a server that loads nothing; then a step."""
    servers = [SglangServer(JsonServer(url, time_limit_s=60)) for url in urls]
    said = []
    with started(config_path, overrides) as (run, _):
        push = FullPush(run.student.student, servers, Path(folder) / "run" / "run-s1")
        for needed in (10**18, 1):
            try:
                with patch("megakd.servers.connect._bytes_of", lambda _, needed=needed: needed):
                    push.push(1)
            except MegakdError as error:
                said.append(str(error))
        run.trainer.train_step(run.source.step(0))
    return said


def adapters(config_path: str, overrides: list[str], folder: str, urls: list[str]) -> list[str]:
    """Three updates with a push after each; the names of the pushed adapters."""
    servers = [VllmServer(JsonServer(url, time_limit_s=60)) for url in urls]
    names = []
    with started(config_path, overrides) as (run, _):
        push = AdapterPush(run.student.student, servers, Path(folder) / "run" / "run-s1", keep=2)
        for version in (1, 2, 3):
            run.trainer.train_step(run.source.step(version - 1))
            names.append(push.push(version).adapter or "")
    return names
