"""Shared parts of the commands: the parser, the config argument and the output of rank 0."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megakd.config.file import load_config
from megakd.config.messages import paths_ending_in
from megakd.config.other_names import missing, synonyms
from megakd.config.paths import expand_path
from megakd.config.run import RunConfig
from megakd.errors import CheckpointError, ConfigError, suggestion
from megakd.process.record import FINAL
from megakd.process.terminal import is_rank_0, print_out


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises its errors as ConfigError."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help lists the options)")

    def print_help(self, file: Any = None) -> None:
        say(self.format_help())

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse options and settings in any order; refuse options that do not exist."""
        arguments, unknown = self.parse_known_intermixed_args(words)
        if unknown:
            name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
            settings = [f"{key}=value" for key in paths_ending_in(name)[:1] or synonyms(name)]
            near = suggestion(unknown[0], self._option_string_actions)
            written = f"settings are written {' or '.join(settings)}" if settings else ""
            if hint := written or missing(name):
                near = f"; {hint}"
            self.error(f"unknown option {unknown[0]}{near}")
        launched = [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]
        arguments.prog, arguments.command = self.prog, f"{self.prog} {shlex.join(launched)}"
        return arguments


def named_folder(text: str) -> Path:
    """Return the folder that an option names; an unset variable of a script names none."""
    if not text:
        raise argparse.ArgumentTypeError('names no folder (got ""); give . for the current one')
    return expand_path(text)


def add_config(parser: Parser) -> None:
    """Add the run config and the settings that override it."""
    parser.add_argument("--config", metavar="F", type=expand_path, help="the run's YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that override the file, such as train.learning_rate=3e-4; a first argument "
        "without = is read as F",
    )
    # Launchers add this option; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def config_of_arguments(arguments: argparse.Namespace) -> RunConfig:
    """Return the checked config of the arguments."""
    path, overrides = arguments.config, list(arguments.overrides)
    if path is None and overrides and "=" not in overrides[0]:
        path = expand_path(overrides.pop(0))
    if path is None:
        raise ConfigError(
            f"--config is missing; give the run's YAML file: {arguments.prog} --config F"
        )
    return load_config(path, overrides)


def scored_model(out: Path, model: str | None) -> Path:
    """Return the folder of a model that is scored; None: that of the run's student.

    Raises:
        CheckpointError: the folder does not exist.
    """
    folder = out / FINAL if model is None else expand_path(model)
    if model == "" or not folder.exists():
        raise CheckpointError(
            f"{folder} does not exist; train first, or give --model FOLDER"
            if model is None
            else f"--model {model}: the folder does not exist; give the folder of a model, such as "
            "a run's final/ or stages/<stage>"
        )
    return folder


def say(text: str) -> None:
    """Print a text, by rank 0 alone."""
    if is_rank_0():
        print_out(text)
