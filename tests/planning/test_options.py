"""The options of `megakd plan`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megakd import cli
from megakd.config.run import RunConfig
from megakd.planning import plan
from megakd.planning.plan import Cluster


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[RunConfig, Cluster]]:
    """The configs and machines that plans were asked for, in place of the plans."""
    asked: list[tuple[RunConfig, Cluster]] = []

    def plan_run(config: RunConfig, cluster: Cluster) -> Any:
        asked.append((config, cluster))
        return SimpleNamespace(as_json=lambda: {"ranks": cluster.ranks})

    monkeypatch.setattr(plan, "plan_run", plan_run)
    monkeypatch.setattr(plan, "page", lambda of: f"a page: {of.as_json()}")
    return asked


def test_plan_takes_the_machines_from_its_options(asked, run_file, capsys):
    words = ["--nodes", "2", "--gpu_memory_gb", "141", "--json", "train.max_steps=3"]

    code = cli.main(["plan", str(run_file), *words])

    config, cluster = asked[0]
    assert code == 0
    assert config.train.max_steps == 3
    assert (cluster.ranks, cluster.nodes, cluster.device) == (16, 2, "cuda")
    assert cluster.device_memory == 141 * 10**9
    assert capsys.readouterr().out == '{\n  "ranks": 16\n}\n'


@pytest.mark.parametrize(("text", "rates"), [("400,45", (400, 45)), ("45", (45, 45))])
def test_one_rate_of_the_network_or_two_are_given(asked, run_file, text, rates):
    assert cli.main(["plan", str(run_file), "--tflops", "300", "--gbps", text]) == 0
    assert (asked[0][1].tflops, asked[0][1].gbps) == (300, rates)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "3", "--nodes", "2"], "3 ranks cannot be divided equally between 2 nodes"),
        (["--gpu_memory_gb", "0"], "--gpu_memory_gb must be a finite number above 0"),
        (["--host_memory_gb", "inf"], "--host_memory_gb must be a finite number above 0"),
        (["--nodes", "0", "--ranks", "1"], "--nodes must be a finite number above 0, got 0"),
        (["--device", "cpu", "--gpu_memory_gb", "80"], "cannot be used with --device cpu"),
        (["--tflops", "-1"], "--tflops must be a finite number above 0, got -1"),
        (["--gbps", "400,0"], "--gbps must be a finite number above 0, got 0"),
        (["--gbps", "fast"], "--gbps must be one or two numbers as in 400,45, got fast"),
    ],
)
def test_machines_that_cannot_be_are_refused(asked, run_file, words, message, capsys):
    assert cli.main(["plan", str(run_file), *words]) == 2
    assert message in capsys.readouterr().err
    assert asked == []
