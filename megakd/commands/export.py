"""Write a finished stage as a Hugging Face folder."""

from __future__ import annotations

import argparse

from megakd.commands.arguments import Parser, add_config, config_of, say
from megakd.errors import ConfigError
from megakd.process.terminal import in_home, print_aside


def add_options(parser: Parser) -> None:
    """Add the config, the stage and the folder to write."""
    add_config(parser)
    parser.add_argument(
        "--stage",
        metavar="NAME",
        help="the stage to export; default: the stage that final/ was copied from",
    )
    parser.add_argument("--to", metavar="FOLDER", type=in_home, help="the folder to write to")


def run(arguments: argparse.Namespace) -> None:
    """Export the stage and print the folder."""
    config = config_of(arguments)
    if arguments.to is None:
        raise ConfigError("--to is missing; give the folder to write the model to")
    with print_aside():
        from megakd.run import finished_run

        folder = finished_run.export_run(config, arguments.stage, arguments.to)
    say(str(folder))
