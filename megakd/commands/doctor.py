"""Examine machines, data and the first steps of a run before it is started."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from megakd.commands.arguments import Parser, add_config, config_of, say
from megakd.errors import ConfigError
from megakd.process.terminal import in_home, print_aside
from megakd.storage.atomic import json_text


def add_options(parser: Parser) -> None:
    """Add the config, the number of steps and the form of the result."""
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--steps", type=int, default=100, help="steps to take, by default 100; 0: none"
    )
    parser.add_argument("--hostfile", type=in_home, help="nodes for DeepSpeed's launcher")


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each finding; return 1 if one of them would fail the run."""
    config = config_of(arguments)
    if arguments.steps < 0:
        raise ConfigError(f"--steps must be at least 0, got {arguments.steps}")
    with print_aside():
        from megakd.commands.examination import examine

        findings = examine(config, steps=arguments.steps, hostfile=arguments.hostfile)
    if arguments.json:
        say(json_text([asdict(one) for one in findings], indent=2))
    else:
        say("\n".join(f"{one.level:8} {one.part}: {one.text}" for one in findings))
    return int(any(one.level == "failure" for one in findings))
