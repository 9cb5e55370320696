"""Score a model on a run's held-out rows, or on a file."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Mapping
from typing import Any

from megakd.commands.arguments import Parser, add_config, config_of_arguments, say, scored_model
from megakd.config.paths import expand_path
from megakd.config.task import STANDARD_ERROR
from megakd.errors import DataError
from megakd.process.files import check_writable, json_text
from megakd.process.terminal import print_aside


def add_options(parser: Parser) -> None:
    """Add the config, the model, the rows to score and the form of the result."""
    add_config(parser)
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="the model to score, default: final/; student.trust_remote_code applies to it",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="score all rows of this file, of the files that match a quoted pattern, or of the "
        "test split of this folder",
    )
    parser.add_argument(
        "--to",
        metavar="OUT",
        help="write the rows of --data with a column `prediction` to this jsonl file, instead of "
        "scores; the rows need no labels",
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print the scores of a model as text or JSON."""
    config, data = config_of_arguments(arguments), arguments.data
    # Before torch is imported, which takes seconds.
    folder = scored_model(config.output_dir, arguments.model)
    if data and not glob.has_magic(data) and not expand_path(data).exists():
        raise DataError(f"--data: {data} does not exist")
    if arguments.to is not None:
        if not data:
            raise DataError("--to: needs --data, the file whose rows get predictions")
        check_writable((to := expand_path(arguments.to)).parent, where="--to")
        with print_aside():
            from megakd.commands.predictions import write_predictions

            count = write_predictions(config, folder, data, to)
        say(f"{to}: {count} rows")
        return
    with print_aside():
        from megakd.commands.scored_models import evaluate_model

        scores = evaluate_model(config, arguments.model, data=data)
    say(json_text(scores, indent=2) if arguments.json else _text(scores))


def _text(scores: Mapping[str, Any]) -> str:
    blocks = [(f"{scores['file']}, {scores['split']}", scores)]
    blocks += [(f"{n} ({one['file']})", one) for n, one in scores["evaluation_sets"].items()]
    lines: list[str] = []
    for head, one in blocks:
        metrics, errors = one["metrics"], one["standard_errors"]
        width = max(map(len, metrics), default=0)
        lines += ["", f"{head}: {one['rows']} rows"]
        for name, value in metrics.items():
            error = errors.get(name + STANDARD_ERROR)
            lines.append(f"{name:{width}}  {value:.4f}" + (f" ±{error:.4f}" if error else ""))
    return "\n".join(lines[1:])
