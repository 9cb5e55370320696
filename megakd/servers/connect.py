"""The replicas that a run config names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.servers.http import PATIENCE_S, JsonServer
from megakd.servers.sglang import SglangServer
from megakd.servers.vllm import VllmServer
from megakd.servers.vllm_weights import VllmWeightServer

if TYPE_CHECKING:
    from megakd.config.servers import RolloutServerConfig, TeacherServerConfig


def replicas_of(
    config: RolloutServerConfig, *, patience_s: float = PATIENCE_S
) -> list[VllmServer | SglangServer]:
    """Return the replicas of `rollout.server` in the order of the config; nothing is asked yet.

    Args:
        config: the key `rollout.server`.
        patience_s: see `JsonServer`.
    """
    kind = SglangServer if config.kind == "sglang" else VllmServer
    if kind is VllmServer and config.push == "full":
        kind = VllmWeightServer
    return [
        kind(JsonServer(url, time_limit_s=config.time_limit, patience_s=patience_s))
        for url in config.url
    ]


def scoring_replicas(
    config: TeacherServerConfig, *, patience_s: float = PATIENCE_S
) -> list[VllmServer]:
    """Return the replicas of `teacher.server` in the order of the config; nothing is asked yet."""
    return [
        VllmServer(JsonServer(url, time_limit_s=config.time_limit, patience_s=patience_s))
        for url in config.url
    ]
