"""Check that the ranks of a run suit teachers that are sharded within nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.config.deepspeed import load_ds_config, shards_within_node
from megakd.engine.nodes import node_group

if TYPE_CHECKING:
    from megakd.config.run import RunConfig


def check_nodes(config: RunConfig) -> None:
    """Raise if the nodes cannot hold a copy of a teacher each, before it is trained in vain.

    A collective if a teacher is sharded within nodes.

    Raises:
        ConfigError: the nodes have different numbers of ranks.
    """
    specs = {f"{config.key_of(n)}.deepspeed": s.deepspeed for n, s in config.teacher_specs.items()}
    if any(shards_within_node(load_ds_config(spec, where=key)) for key, spec in specs.items()):
        node_group()
