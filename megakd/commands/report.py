"""Write the report.html of a finished run again."""

from __future__ import annotations

import argparse

from megakd.commands.arguments import Parser, named_folder, say


def add_options(parser: Parser) -> None:
    """Add the folder of the run."""
    parser.add_argument(
        "folder", metavar="DIR", type=named_folder, help="output_dir of a finished run"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the page and print its path."""
    from megakd.reports.html import write_html_report

    say(str(write_html_report(arguments.folder)))
