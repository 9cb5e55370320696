"""Estimate memory and time of a run without loading a model."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from typing import Any

import psutil

from megakd.commands.arguments import Parser, add_config, config_of, is_rank_0, say
from megakd.config.run import RunConfig
from megakd.errors import ConfigError
from megakd.planning.cluster import GIGA, Cluster, Device
from megakd.process.terminal import print_aside
from megakd.storage.atomic import json_text


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
    parser.add_argument(
        "--gbps",
        metavar="WITHIN,BETWEEN",
        help="1e9 bytes per second that a rank sends within a node and between nodes; one number: "
        "both",
    )


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


def cluster_of(options: Mapping[str, Any]) -> Cluster:
    """Return the machines that the options describe; defaults come from this machine."""
    import torch

    memory, host = _bytes(options, "gpu_memory_gb"), _bytes(options, "host_memory_gb")
    has_gpu = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    own: Device = "cuda" if memory is not None or has_gpu else "cpu"
    device: Device = options.get("device") or own
    if device == "cpu" and memory is not None:
        raise ConfigError("--gpu_memory_gb cannot be used with --device cpu; remove one of the two")
    if device == "cuda" and memory is None and has_gpu:
        memory = torch.cuda.get_device_properties(0).total_memory
    if device == "cpu" and host is None:
        host = psutil.virtual_memory().total
    nodes = 1 if options.get("nodes") is None else options["nodes"]
    ranks = options.get("ranks")
    return Cluster(
        ranks=(8 if device == "cuda" else 1) * nodes if ranks is None else ranks,
        nodes=nodes,
        device=device,
        device_memory=memory,
        host_memory=host,
        tflops=options.get("tflops"),
        gbps=_rates(options.get("gbps")),
    )


def _bytes(options: Mapping[str, Any], name: str) -> int | None:
    size = options.get(name)
    if size is not None and not 0 < size < math.inf:
        raise ConfigError(f"--{name} must be a finite number above 0, got {size:g}")
    return None if size is None else round(size * GIGA)


def _rates(text: str | float | None) -> tuple[float, float] | None:
    if text is None:
        return None
    words = str(text).split(",")
    try:
        within, between = map(float, words * 2 if len(words) == 1 else words)
    except ValueError:
        raise ConfigError(f"--gbps must be one or two numbers as in 400,45, got {text}") from None
    return within, between
