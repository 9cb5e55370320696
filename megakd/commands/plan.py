"""Estimate memory and time of a run without loading a model."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import psutil

from megakd.commands.arguments import Parser, add_config, config_of, is_rank_0, say
from megakd.config.run import RunConfig
from megakd.errors import ConfigError
from megakd.planning.cluster import GIGA, Cluster, Device, Rates, rates_of
from megakd.process.terminal import in_home, print_aside
from megakd.storage.atomic import json_text

DEVICE_BASE = 1_500_000_000
"""Bytes of a GPU for its context and the NCCL buffers; assumed, not measured."""


def add_options(parser: Parser) -> None:
    """Add the config, the machines of the run and their rates."""
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="ranks of all nodes; default: 8 per node, 1 on CPUs"
    )
    parser.add_argument("--nodes", type=int, metavar="M", help="nodes; default: 1")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the device of this machine"
    )
    parser.add_argument(
        "--gpu_memory_gb", type=float, metavar="GB", help="memory of a GPU in 1e9 bytes"
    )
    parser.add_argument(
        "--host_memory_gb", type=float, metavar="GB", help="memory of a node in 1e9 bytes"
    )
    parser.add_argument("--tflops", type=float, help="1e12 operations per second and rank")
    parser.add_argument("--gbps", type=float, help="1e9 bytes per second that a rank sends")
    parser.add_argument("--rates", type=in_home, metavar="F", help="JSON file with tflops and gbps")


def run(arguments: argparse.Namespace) -> None:
    """Print the plan of a run."""
    print_plan(config_of(arguments), arguments)


def print_plan(config: RunConfig, arguments: argparse.Namespace) -> None:
    """Print a plan as text or JSON; options that the command lacks have their defaults."""
    if not is_rank_0():
        return
    as_json = getattr(arguments, "json", False)
    with print_aside(when=as_json):
        cluster = cluster_of(vars(arguments))
        from megakd.planning.plan import page, plan_run

        plan = plan_run(config, cluster)
    say(json_text(plan.as_json(), indent=2) if as_json else page(plan))


def cluster_of(given: Mapping[str, Any]) -> Cluster:
    """Return the machines that the options describe; defaults come from this machine."""
    memory, host = _bytes(given, "gpu_memory_gb"), _bytes(given, "host_memory_gb")
    device: Device = given.get("device") or ("cuda" if memory is not None else _own_device())
    if device == "cpu" and memory is not None:
        raise ConfigError("--gpu_memory_gb cannot be used with --device cpu; remove one of the two")
    ranks, nodes = _places(given.get("ranks"), given.get("nodes"), device)
    rates = rates_of(given["rates"]) if given.get("rates") else Rates()
    named = {name: given[name] for name in ("tflops", "gbps") if given.get(name) is not None}
    rates = replace(rates, **named)
    cluster = Cluster(ranks=ranks, nodes=nodes, device=device, host_memory=host, rates=rates)
    if device == "cuda":
        return replace(cluster, device_memory=memory or _own_memory(), device_base=DEVICE_BASE)
    host = host or psutil.virtual_memory().total
    return replace(cluster, host_memory=host, device_memory=round(host / cluster.ranks_per_node))


def _bytes(given: Mapping[str, Any], name: str) -> int | None:
    size = given.get(name)
    if size is not None and not 0 < size < math.inf:
        raise ConfigError(f"--{name} must be a finite number above 0, got {size:g}")
    return None if size is None else round(size * GIGA)


def _places(ranks: int | None, nodes: int | None, device: str) -> tuple[int, int]:
    # Without both numbers the launcher's values apply. The default is 8 GPUs or one CPU rank per
    # node.
    if ranks is None and nodes is None and "WORLD_SIZE" in os.environ:
        world = _number("WORLD_SIZE")
        local = next((n for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if os.environ.get(n)), None)
        return world, 1 if local is None else max(1, world // _number(local))
    nodes = 1 if nodes is None else nodes
    return (8 if device == "cuda" else 1) * nodes if ranks is None else ranks, nodes


def _number(variable: str) -> int:
    text = os.environ[variable]
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"{variable}={text} is not a number above 0; unset it or use --ranks")
    return int(text)


def _own_device() -> Device:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _own_memory() -> int | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
