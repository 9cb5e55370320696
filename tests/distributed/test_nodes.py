"""A teacher that is sharded within nodes: one whole copy per node, and the same answers."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from cases import elements, local, started, summed
from deepspeed.runtime.zero import partition_parameters
from equal_runs import ZERO3, difference, write_pair

from megakd.engine import distributed
from megakd.engine.memory import forget_models
from megakd.engine.sharding import gathered_state


def taught(config_path: str, overrides: list[str], count: int) -> dict:
    """Two steps with a teacher on `count` nodes: losses, weights, shards, and the gathers."""
    with claimed_nodes(count), gathers() as groups:
        with started(config_path, overrides) as (run, teacher):
            batches = run.source.step(0)
            groups.clear()
            logits = teacher(batches[0]).logits
            answering = list(groups)
            losses = [summed(run.trainer.train_step(run.source.step(n)).parts) for n in range(2)]
            shards = [local(p) for p in teacher.model.parameters()]
            facts = {
                "logits": logits,
                "losses": losses,
                "groups": answering,
                "weights": dict(gathered_state(teacher.model)),
                "share": sum(shard.numel() for shard in shards) / elements(teacher.model),
            }
            model = weakref.ref(teacher.model)
        del run, teacher, shards
        forget_models()
    return {**facts, "freed": model() is None}


@contextmanager
def claimed_nodes(count: int) -> Iterator[None]:
    """Equally many ranks on each of `count` nodes of this host, as its launchers would say."""
    node = dist.get_rank() * count // dist.get_world_size()
    launched = patch.dict(os.environ, {"CROSS_RANK": str(node)})
    with launched, patch.dict(distributed._NODE_GROUPS, clear=True):
        yield


@contextmanager
def gathers() -> Iterator[list[int]]:
    """The number of ranks of each gather of weights."""
    groups: list[int] = []
    gather = partition_parameters._dist_allgather_fn

    def noting(part, whole, group=None):
        groups.append(dist.get_world_size(group))
        return gather(part, whole, group)

    with patch.object(partition_parameters, "_dist_allgather_fn", noting):
        yield groups


# Small weights are sharded too, and gathered in every forward.
NODE = {"megakd": {"shard_within_node": True}, **ZERO3}


@pytest.mark.parametrize(
    ("ranks", "nodes", "language", "student"),
    [
        (2, 2, False, "zero2"),  # a rank alone on its node has everything
        (2, 1, False, "zero2"),  # one node: like teacher_zero3
        pytest.param(2, 2, True, "zero3", marks=pytest.mark.slow),
        pytest.param(4, 2, False, "zero2", marks=pytest.mark.slow),
        pytest.param(4, 2, True, "zero3", marks=pytest.mark.slow),
    ],
)
def test_each_node_has_one_copy_of_a_teacher_that_answers_as_if_whole(
    workers, tmp_path, ranks, nodes, language, student
):
    path = write_pair(tmp_path / "run", language=language, student=student, teacher=NODE)
    of_node = ranks // nodes
    whole = ["teacher.deepspeed=teacher_zero0"]

    expected = workers(ranks).run("test_nodes.taught", path, whole, nodes)
    actual = workers(ranks).run("test_nodes.taught", path, [], nodes)

    for with_copy, with_whole in zip(actual, expected, strict=True):
        assert with_copy["share"] == pytest.approx(1 / of_node, abs=0.01)
        assert set(with_copy["groups"]) == ({of_node} if of_node > 1 else set())
        for step, whole_step in zip(with_copy["losses"], with_whole["losses"], strict=True):
            assert step == pytest.approx(whole_step, rel=1e-5)
        if not language:
            torch.testing.assert_close(with_copy["logits"], with_whole["logits"])
        assert with_copy["freed"]
    assert difference(actual[0]["weights"], expected[0]["weights"]) == 0
