"""A teacher sharded within nodes, on ranks that claim to be on several nodes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch.distributed as dist
from cases import started, summed
from deepspeed.runtime.zero import partition_parameters
from engine_cases import elements, local

from megakd.engine import nodes
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
    with patch.dict(os.environ, {"CROSS_RANK": str(node)}), patch.dict(nodes._GROUPS, clear=True):
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
