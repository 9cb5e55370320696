"""List the methods, or the loss terms, with their options."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Mapping

from megakd.commands.arguments import Parser, say
from megakd.config.schema import variants
from megakd.contract.terms import PLUGIN_TERM, TermConfig
from megakd.errors import ConfigError, suggestion
from megakd.methods import PLUGIN_METHOD, MethodConfig


def add_options(parser: Parser) -> None:
    """Add the kind and the name of what to list."""
    parser.add_argument("--losses", action="store_true", help="list the loss terms instead")
    parser.add_argument("name", nargs="?", metavar="NAME", help="show only this method or loss")


def run(arguments: argparse.Namespace) -> None:
    """Print the methods, or the loss terms, with their docstrings and options."""
    name, losses = arguments.name, arguments.losses
    kinds = variants(TermConfig, "loss") if losses else variants(MethodConfig, "name")
    if name is not None:
        kinds = {name: _named(name, kinds, losses=losses)}
    say("\n\n".join(_entry(known, kind) for known, kind in kinds.items()))


def _named(name: str, kinds: Mapping[str, type], *, losses: bool) -> type:
    if name in kinds:
        return kinds[name]
    if ":" in name:
        return (PLUGIN_TERM if losses else PLUGIN_METHOD).kind(name)
    near, noun = suggestion(name, kinds) or ";", "loss" if losses else "method"
    if not losses and name in variants(TermConfig, "loss"):
        near = f"; {name} is a loss: megakd methods --losses {name};"
    raise ConfigError(f'unknown {noun} "{name}"{near} known: {", ".join(kinds)}')


def _entry(name: str, kind: type) -> str:
    lines = [name, textwrap.indent(inspect.getdoc(kind) or "", "  ")]
    for option in dataclasses.fields(kind):
        is_required = option.default is dataclasses.MISSING
        shown = "" if is_required else json.dumps(option.default, default=dataclasses.asdict)
        if option.name not in ("name", "loss"):
            lines.append(f"    {option.name}: {shown or 'required'}")
    return "\n".join(lines)
