"""Distil a teacher into a student, as described by a run config."""

from __future__ import annotations

import argparse
import time

import psutil

from megakd.commands.arguments import Parser, add_config, config_of_arguments, say
from megakd.config.file import check_paths, dump_config
from megakd.config.run import RunConfig
from megakd.process.clock import counted
from megakd.process.record import REPORT
from megakd.process.terminal import is_rank_0
from megakd.run.holder import check_free


def add_options(parser: Parser) -> None:
    """Add the config, and what to print in place of a training."""
    add_config(parser)
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--print-config", action="store_true", help="print the resolved config and stop"
    )
    either.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="take three steps of every stage, print time and memory beside the plan, and stop",
    )


def run(arguments: argparse.Namespace) -> None:
    """Train and print the result table, or print the config, or what three steps take."""
    config = config_of_arguments(arguments)
    if arguments.print_config:
        say(dump_config(config))
    elif arguments.dry_run:
        from megakd.run.dry_run import dry_run

        check_paths(config)
        say(dry_run(config))
    else:
        train(config, arguments.command)


def train(config: RunConfig, command: str) -> None:
    """Run a config and print the result table."""
    # The inputs of a finished run may be gone. Only rank 0 reads them; launchers end the others.
    if is_rank_0():
        if not (config.output_dir / REPORT).is_file():
            check_paths(config)
        check_free(config.output_dir)
    since_start_s = max(0.0, time.time() - psutil.Process().create_time())
    with counted(since_s=since_start_s):
        from megakd.run import main

        say(main.run(config, command=command))
