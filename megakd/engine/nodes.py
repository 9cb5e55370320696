"""Process groups of the ranks of a node, over which a teacher can be sharded.

A teacher that is sharded within nodes has one whole copy per node, so that no weight is gathered
from another node. DeepSpeed gets the group with each parameter, from `zero.Init`: an `mpu` would
change the group of every engine of the process, the student's included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megakd.config.deepspeed import load_ds_config, shards_within_node
from megakd.engine.collectives import gather, node_name
from megakd.errors import ConfigError

if TYPE_CHECKING:
    from megakd.config.run import RunConfig

_GROUPS: dict[dist.ProcessGroup, dist.ProcessGroup | None] = {}
"""The group of this rank's node, by the default group; None if there is one node."""


def node_group() -> dist.ProcessGroup | None:
    """Return the process group of this rank's node; None for a single node.

    The first call is a collective.
    """
    world = dist.group.WORLD
    if world is None:
        return None
    if world not in _GROUPS:
        nodes = ranks_by_node(gather(node_name()))
        _GROUPS.clear()  # of a default group that has ended
        _GROUPS[world] = _own_group(nodes) if len(nodes) > 1 else None
    return _GROUPS[world]


def ranks_by_node(names: Sequence[str]) -> list[list[int]]:
    """Return the ranks of each node; all nodes must have the same number of ranks."""
    nodes: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        nodes.setdefault(name, []).append(rank)
    most, least = (f(nodes, key=lambda name: len(nodes[name])) for f in (max, min))
    if len(nodes[most]) != len(nodes[least]):
        raise ConfigError(
            "megakd.shard_within_node in a teacher's DeepSpeed config needs the same number of "
            f"ranks on every node: {most} has {len(nodes[most])}, {least} has "
            f"{len(nodes[least])}; start as many ranks on every node, or use the preset "
            "teacher_zero3, which shards over all ranks"
        )
    return list(nodes.values())


def _own_group(nodes: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    # Every rank must create the groups of all nodes. By default, a group of NCCL would ignore
    # `train.collective_timeout`.
    timeout = distributed_c10d.default_pg_timeout
    groups = [dist.new_group(list(ranks), timeout=timeout) for ranks in nodes]
    group = groups[next(n for n, ranks in enumerate(nodes) if dist.get_rank() in ranks)]
    assert isinstance(group, dist.ProcessGroup)  # noqa: S101 - this rank is a member
    return group


def check_nodes(config: RunConfig) -> None:
    """Raise if the nodes cannot hold a copy of a teacher each, before it is trained in vain.

    A collective if a teacher is sharded within nodes.
    """
    specs = {f"{config.key_of(n)}.deepspeed": s.deepspeed for n, s in config.teacher_specs.items()}
    if any(shards_within_node(load_ds_config(spec, where=key)) for key, spec in specs.items()):
        node_group()
