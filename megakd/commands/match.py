"""Score teachers, the student's start and the held-out rows before training."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from megakd.commands.arguments import Parser, add_config, config_of, is_rank_0, say
from megakd.config.checks.path_rules import check_paths
from megakd.process.terminal import aligned_rows, print_aside
from megakd.storage.atomic import json_text

TITLES = {
    "gap": "gap",
    "kl": "KL",
    "entropy": "entropy",
    "same_top": "same top 1",
    "overlap": "top overlap",
    "squared_difference": "squared difference",
    "vocabulary": "vocabulary",
    "chat_template": "chat template",
}
"""Values of a teacher in JSON -> titles of the columns, after the metric and the loss."""


def add_options(parser: Parser) -> None:
    """Add the config and the form of the result."""
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print what the teachers know that the student's start does not, as text or JSON."""
    config = config_of(arguments)
    if is_rank_0():
        check_paths(config)
    with print_aside():
        from megakd.commands.matched_models import match_models

        scores = match_models(config)
    say(json_text(scores, indent=2) if arguments.json else _text(scores))


def _text(scores: Mapping[str, Any]) -> str:
    start, teachers = scores["start"], scores["teachers"]
    # A teacher with another vocabulary is not compared with the start.
    entropies = [one["start_entropy"] for one in teachers.values() if "start_entropy" in one]
    start_row = {**start, **({"entropy": entropies[0]} if entropies else {})}
    rows = [("start", start_row), *teachers.items()]  # a teacher may be named start too
    used = {key: title for key, title in TITLES.items() if any(key in row for _, row in rows)}
    metrics = list(dict.fromkeys([scores["metric"], "loss"]))
    cells = [
        [name, *map(_cell, [*map(row["metrics"].get, metrics), *map(row.get, used)])]
        for name, row in rows
    ]
    lines = [
        f"{scores['file']}, {scores['split']}: {scores['rows']} rows",
        f"start: {start['model']}",
        *aligned_rows([["", *metrics, *used.values()], *cells]),
    ]
    if scores["ranking"]:
        lines.append(f"best teacher first, by accuracy: {', '.join(scores['ranking'])}")
    return "\n".join(lines)


def _cell(value: float | str | None) -> str:
    return value or "" if isinstance(value, str | None) else f"{value:.4f}"
