"""Estimate memory and time of a run without loading a model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megakd.commands.arguments import Parser, add_config, config_of_arguments, say
from megakd.config.run import RunConfig
from megakd.errors import ConfigError
from megakd.process.files import json_text
from megakd.process.terminal import is_rank_0, print_aside

if TYPE_CHECKING:
    from megakd.reports.plan import Plan


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
    print_plan(config_of_arguments(arguments), arguments)


def plan_of(config: RunConfig, machines: Mapping[str, Any]) -> Plan:
    """Plan a run on machines, the options of the command; see `api.plan`."""
    # Before the imports, which take seconds.
    if config.task.max_length is None:
        raise ConfigError(
            "task.max_length: missing, and a plan reads no data; set it to the tokens of the "
            "longest row to plan for (a run takes the length of 99 % of the training rows)"
        )
    from megakd.reports.plan import cluster_of, plan_run

    return plan_run(config, cluster_of(machines))


def print_plan(config: RunConfig, arguments: argparse.Namespace) -> None:
    """Print a plan as text or JSON; options that the command lacks have their defaults."""
    if not is_rank_0():
        return
    as_json = getattr(arguments, "json", False)
    with print_aside(when=as_json):
        plan = plan_of(config, vars(arguments))
        from megakd.reports.plan import page

    say(json_text(plan.as_json(), indent=2) if as_json else page(plan))
