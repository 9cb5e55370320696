"""Print what a finished model answers to texts."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from megakd.commands.arguments import Parser, named_folder, say
from megakd.errors import ConfigError, DataError
from megakd.process.terminal import print_aside
from megakd.storage.atomic import json_text

BREAKS = re.compile(r"[\t-\r\x1c-\x1e\x85\u2028\u2029]")


def add_options(parser: Parser) -> None:
    """Add the model, the texts and the form of the answers."""
    parser.add_argument(
        "model", metavar="MODEL", type=named_folder, help="a run's final/, or its export"
    )
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="a tab parts the two texts of a pair; default: the lines of standard input",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=64, help="of a decoder's text; default 64"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per text")


def run(arguments: argparse.Namespace) -> None:
    """Print one line per text: label and probability, a number, or the continuation."""
    if not arguments.model.is_dir():
        raise ConfigError(f"{arguments.model} is not a folder; give a model such as a run's final/")
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens must be at least 1 (got {arguments.max_new_tokens})")
    texts = arguments.texts or [os.fsdecode(line).rstrip("\r\n") for line in sys.stdin.buffer]
    if texts and not arguments.texts:
        texts[0] = texts[0].removeprefix("\ufeff")
    if not texts:
        raise ConfigError("no text is given; write texts behind MODEL, or one per line on stdin")
    for number, text in enumerate(texts, start=1):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"text {number} is not UTF-8: {text!r:.80}; convert it") from None
    with print_aside():
        from transformers.utils import logging

        from megakd.models.answers import answers_of

        logging.disable_progress_bar()
        answers = list(answers_of(arguments.model, texts, new_tokens=arguments.max_new_tokens))
    for answer in answers:
        say(json_text(answer) if arguments.json else _line(answer))


def _line(answer: Mapping[str, Any]) -> str:
    """Return an answer of one kind: label, number, tokens of each mask, or text."""
    if "label" in answer:
        label = BREAKS.sub(lambda character: repr(character[0])[1:-1], answer["label"])
        return f"{label}\t{answer['probability']:.3f}"
    if "tokens" in answer:
        return "\t".join(" ".join(tokens) for tokens in answer["tokens"])
    return answer["text"] if "text" in answer else f"{answer['value']:.4g}"
