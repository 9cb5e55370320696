"""List the methods, or the loss terms, with their options."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import textwrap

from megakd.commands.arguments import Parser, say
from megakd.config.options import METHODS
from megakd.config.terms import TERMS
from megakd.errors import ConfigError
from megakd.plugins import WrongNameError


def add_options(parser: Parser) -> None:
    """Add the kind and the name of what to list."""
    parser.add_argument("--losses", action="store_true", help="list the loss terms instead")
    parser.add_argument("name", nargs="?", metavar="NAME", help="show only this method or loss")


def run(arguments: argparse.Namespace) -> None:
    """Print the methods, or the loss terms, with their docstrings and options."""
    name, kinds = arguments.name, TERMS if arguments.losses else METHODS
    try:
        entries = [_entry(each, kinds.kind(each)) for each in ([name] if name else kinds.names())]
    except WrongNameError as error:
        is_loss = kinds is METHODS and name in TERMS.names()
        hint = f'unknown method "{name}"; {name} is a loss: megakd methods --losses {name}; known: '
        raise ConfigError(hint + ", ".join(error.known) if is_loss else str(error)) from None
    say("\n\n".join(entries))


def _entry(name: str, kind: type) -> str:
    help_text, *inherited = (inspect.getdoc(each) or "" for each in kind.__mro__[:-1])
    lines, helps = list[str](), [help_text]
    for option in dataclasses.fields(kind):
        is_required = option.default is dataclasses.MISSING
        shown = "" if is_required else json.dumps(option.default, default=dataclasses.asdict)
        if option.name not in ("name", "loss"):
            lines.append(f"    {option.name}: {shown or 'required'}")
        # Its paragraph in the docstring of the base class that has it.
        pattern = re.compile(rf"^{option.name}: .*(\n .*)*", re.MULTILINE)
        if not pattern.search(help_text) and (match := pattern.search("\n\n".join(inherited))):
            helps += [match[0]] if len(helps) > 1 else ["", match[0]]
    lines = [name, textwrap.indent("\n".join(helps), "  "), *lines]
    return "\n".join(lines)
