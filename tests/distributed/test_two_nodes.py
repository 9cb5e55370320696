"""Two launchers on this machine, as on two nodes, train as one launcher with as many ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TRAIN, free_port
from launchers import start
from test_launchers import finish
from tiny_runs import bert, config_tree, write_config, write_reviews

STEPS = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    task = {"type": "classification", "dataset": str(write_reviews(folder / "reviews"))}
    tree = config_tree(
        Path("unused"),
        task,
        teacher={"model": bert(2), "deepspeed": "teacher_zero3", "finetune": {}},
        student={"model": bert(1)},
        method={"name": "single"},
        log={"report_to": [], "logging_steps": 1},
    )
    tree["train"] |= {"max_steps": STEPS}
    return write_config(folder / "run.yaml", tree)


@pytest.fixture(scope="module")
def one_launcher(launch, config, tmp_path_factory):
    """Stage -> the folder of the same run on one node, made when first asked for."""
    made: dict[str, Path] = {}

    def of(stage: str) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("one-node") / "out"
            words = (f"output_dir={made[stage]}", f"student.deepspeed={stage}")
            group = launch("--config", str(config), *words)
            assert group.wait() == [0, 0], group.text
        return made[stage]

    return of


def hostfile(folder: Path) -> list[list[str]]:
    """The commands of DeepSpeed's launcher on each node, without ssh."""
    hosts = folder / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    meeting = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    words = ["-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", str(hosts), "--no_ssh"]
    return [[*words, "--node_rank", str(node), *meeting] for node in range(2)]


def rendezvous(folder: Path) -> list[list[str]]:
    """The command of torchrun, the same on each node."""
    del folder
    words = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    return [[*words, *meeting, "--rdzv_id", "job", "--local_addr", "127.0.0.1"]] * 2


def losses(out: Path) -> list[tuple[str, int, float]]:
    """The loss of every step of every stage."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [
        (line["stage"], line["step"], line["train/loss"]) for line in lines if "train/loss" in line
    ]


# On one node the teacher is always sharded over all ranks.
@pytest.mark.parametrize(
    ("launcher", "stage", "teacher"),
    [
        (hostfile, "zero3", "teacher_zero3"),
        (rendezvous, "zero3", "teacher_zero3_node"),
        pytest.param(hostfile, "zero2", "teacher_zero3_node", marks=pytest.mark.slow),
        pytest.param(rendezvous, "zero2", "teacher_zero3", marks=pytest.mark.slow),
    ],
)
def test_two_nodes_give_the_losses_of_one(config, one_launcher, tmp_path, launcher, stage, teacher):
    out, caches = tmp_path / "out", [tmp_path / f"cache-{node}" for node in range(2)]
    models = (f"student.deepspeed={stage}", f"teacher.deepspeed={teacher}")
    run = (str(TRAIN), "--config", str(config), f"output_dir={out}", *models)

    said = finish(
        [
            start((*words, *run), {"MEGAKD_CACHE": cache})
            for words, cache in zip(launcher(tmp_path), caches, strict=True)
        ]
    )

    assert [code for code, _ in said] == [0, 0], said
    found, expected = losses(out), losses(one_launcher(stage))
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    assert [entry[2] for entry in found] == pytest.approx([entry[2] for entry in expected])
    assert {stage for stage, _, _ in found} == {"teacher-finetune", "student"}
