"""The options of `megakd evaluate`, without importing torch so that `--help` is fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    """Add the model and the rows to score, and the form of the result."""
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="the model to score, default: final/; student.allow_pickle and "
        "student.trust_remote_code apply to it",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="score all rows of this file, of the files that match a quoted pattern, or of the "
        "test split of this folder; the same as task.dataset=FILE",
    )
    parser.add_argument(
        "--trust_label_order",
        "--trust-label-order",
        action="store_true",
        help="the model's labels LABEL_0, … have the order of the labels in the data",
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
