"""The command line: `launch/train.py` and `megakd train | plan | evaluate | export | report | …`.

A user error is reported as one message on stderr, only by rank 0, with exit code 2. Torch is
imported only when a command needs it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import psutil

from megakd.config.catalogue import catalogue
from megakd.config.checks import check_paths
from megakd.config.file import dump_config, load_config
from megakd.config.run import RunConfig
from megakd.config.schema import paths_ending_in
from megakd.config.scoring_options import add_scoring_options
from megakd.config.shrink_file import (
    add_shrink_options,
    launch_command,
    shrink_config,
    write_shrink_config,
)
from megakd.config.synonyms import synonyms
from megakd.errors import ConfigError, MegakdError, PeerLostError, suggestion
from megakd.planning.options import add_plan_options, cluster_of
from megakd.process.garbage import no_collections
from megakd.process.phases import counted
from megakd.process.signals import Stopped, watched
from megakd.process.terminal import in_home, print_aside, tell
from megakd.storage.atomic import json_text

_USER_ERROR = 2


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run the training of a run config; the main function of `launch/train.py`.

    Args:
        argv: arguments without the program; None takes the arguments of the process.

    Returns:
        The exit code: 0 if the run is complete, 2 for an error that the user has to correct.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    return _guarded(lambda: _run_command("train", words, prog="launch/train.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `megakd` command.

    Args:
        argv: arguments without the program; None takes the arguments of the process.

    Returns:
        The exit code: 0 for success, 2 for an error that the user has to correct.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    return _guarded(lambda: _dispatch(words))


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises its errors as ConfigError."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} ({self.prog} --help lists the options)")

    def print_help(self, file: Any = None) -> None:
        del file
        _say(self.format_help())

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse options and settings in any order; refuse options that do not exist."""
        arguments, unknown = self.parse_known_intermixed_args(words)
        if unknown:
            self.error(f"unknown option {unknown[0]}{self._nearest(unknown[0])}")
        launched = [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]
        arguments.prog, arguments.command = self.prog, f"{self.prog} {shlex.join(launched)}"
        return arguments

    def _nearest(self, word: str) -> str:
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        settings = paths_ending_in(name)[:1] or synonyms(name)
        if settings:
            return f"; settings are written {' or '.join(f'{key}=value' for key in settings)}"
        return suggestion(word, self._option_string_actions)


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        _say(_overview())
        return 0 if words else _USER_ERROR
    if words[0] in ("-V", "--version"):
        _say(f"megakd {version('megakd')}")
        return 0
    name, *rest = words
    if name not in _COMMANDS:
        near = suggestion(name, _COMMANDS)
        raise ConfigError(f'unknown command "{name}"{near or ";"} known: {", ".join(_COMMANDS)}')
    return _run_command(name, rest, prog=f"megakd {name}")


def _run_command(name: str, words: Sequence[str], *, prog: str) -> int:
    add_arguments, command, description = _COMMANDS[name]
    parser = _Parser(prog=prog, description=description)
    add_arguments(parser)
    return command(parser.parse(words))


def _overview() -> str:
    lines = [f"  {name:10}{description}" for name, (_, _, description) in _COMMANDS.items()]
    usage = "usage: megakd {" + ",".join(_COMMANDS) + "} ...\n"
    return "\n".join([usage, *lines, "\nSee also: megakd COMMAND --help, megakd --version."])


def _guarded(command: Callable[[], int]) -> int:
    try:
        with watched():
            return command()
    except Stopped as stop:
        if _is_rank_0():
            sys.stderr.write(f"megakd: {stop}\n")
        return stop.exit_code
    except PeerLostError as error:
        sys.stderr.write(f"megakd: {error}\n")  # by every rank: rank 0 may be the lost one
        return error.exit_code
    except MegakdError as error:
        if _is_rank_0():
            sys.stderr.write(f"megakd: error: {error}\n")
        return error.exit_code


def _is_rank_0() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _say(text: str) -> None:
    if _is_rank_0():
        tell(text)


def _add_config(parser: _Parser) -> None:
    parser.add_argument("--config", metavar="F", type=in_home, help="the run's YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that override the file, such as train.learning_rate=3e-4; a first argument "
        "without = is read as F",
    )
    # Launchers add this option; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _add_train(parser: _Parser) -> None:
    _add_config(parser)
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--print-config", action="store_true", help="print the resolved config and stop"
    )
    either.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="print the run's plan and stop"
    )


def _add_plan(parser: _Parser) -> None:
    _add_config(parser)
    add_plan_options(parser)


def _add_evaluate(parser: _Parser) -> None:
    _add_config(parser)
    add_scoring_options(parser)


def _add_encode(parser: _Parser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--to", metavar="FOLDER", type=in_home, help="the folder to write, default: task.encoded"
    )


def _add_export(parser: _Parser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--stage",
        metavar="NAME",
        help="the stage to export; default: the stage that final/ was copied from",
    )
    parser.add_argument("--to", metavar="FOLDER", type=in_home, help="the folder to write to")


def _add_report(parser: _Parser) -> None:
    parser.add_argument("folder", metavar="DIR", type=in_home, help="output_dir of a finished run")


def _add_methods(parser: _Parser) -> None:
    parser.add_argument("--losses", action="store_true", help="list the loss terms instead")
    parser.add_argument("name", nargs="?", metavar="NAME", help="show only this method or loss")


def _config(arguments: argparse.Namespace) -> RunConfig:
    path, overrides = arguments.config, list(arguments.overrides)
    if path is None and overrides and "=" not in overrides[0]:
        path = in_home(overrides.pop(0))
    if path is None:
        raise ConfigError(
            f"--config is missing; give the run's YAML file: {arguments.prog} --config F"
        )
    return load_config(path, overrides)


def _train(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    if arguments.print_config:
        _say(dump_config(config))
        return 0
    if arguments.dry_run:
        return _print_plan(config, arguments)
    return _run(config, arguments.command)


def _run(config: RunConfig, command: str) -> int:
    # The inputs of a finished run may be gone. Only rank 0 reads them; launchers end the others.
    if _is_rank_0() and not (config.output_dir / "report.json").is_file():
        check_paths(config)
    _prefer_large_pages()
    with counted(since_s=_seconds_since_start()):
        with no_collections():
            from megakd.run import main as run

        _say(run.run(config, command=command))
    return 0


def _shrink(arguments: argparse.Namespace) -> int:
    config, text = shrink_config(arguments)
    if arguments.print_config:
        _say(dump_config(config))
        return 0
    if arguments.plan:
        return _print_plan(config, arguments)
    path = write_shrink_config(config, text)
    if arguments.ranks > 1:
        _say(launch_command(path, arguments.ranks))
        return 0
    return _run(config, arguments.command)


def _seconds_since_start() -> float:
    return max(0.0, time.time() - psutil.Process().create_time())


def _plan(arguments: argparse.Namespace) -> int:
    return _print_plan(_config(arguments), arguments)


def _print_plan(config: RunConfig, arguments: argparse.Namespace) -> int:
    if not _is_rank_0():
        return 0
    as_json = getattr(arguments, "json", False)
    with print_aside(when=as_json):
        cluster = cluster_of(arguments)
        from megakd.planning.page import page
        from megakd.planning.plan import plan_run

        plan = plan_run(config, cluster)
    _say(json_text(plan.as_json(), indent=2) if as_json else page(plan))
    return 0


def _prefer_large_pages() -> None:
    """Let torch allocate CPU tensors in pages of 2 MB, before torch's first allocation.

    A sharded model is gathered again in every forward. With small pages, the system would take as
    long to provide the memory as the ranks take to fill the memory.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _cache(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    _prefer_large_pages()
    with print_aside():
        from megakd.run.caching import cache_teachers

        paths = cache_teachers(config)
    _say("\n".join(map(str, paths)))
    return 0


def _encode(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    with print_aside():
        from megakd.run.encoding import encode_run

        folder = encode_run(config, arguments.to)
    _say(f"the run reads the encoded data with task.encoded={folder}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    local = _take_local_dataset(arguments)
    data = arguments.data or local
    config = _config(arguments)
    _prefer_large_pages()
    with print_aside():
        from megakd.run import model_evaluation

        found = model_evaluation.evaluate_model(
            config, arguments.model, data=data, trusts_order=arguments.trust_label_order
        )
    from megakd.reports.scores import scores_text

    _say(json_text(found, indent=2) if arguments.json else scores_text(found))
    return 0


def _take_local_dataset(arguments: argparse.Namespace) -> str | None:
    given = [word for word in arguments.overrides if word.startswith("task.dataset=")]
    value = given[-1].partition("=")[2] if given else ""
    if not value or not Path(value).expanduser().exists():
        return None
    arguments.overrides = [word for word in arguments.overrides if word not in given]
    return value


def _export(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    if arguments.to is None:
        raise ConfigError("--to is missing; give the folder to write the model to")
    with print_aside():
        from megakd.run import finished_run

        folder = finished_run.export_run(config, arguments.stage, arguments.to)
    _say(str(folder))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from megakd.reports.html import write_html_report

    _say(str(write_html_report(arguments.folder)))
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    _say(catalogue(arguments.name, losses=arguments.losses))
    return 0


_COMMANDS: dict[str, tuple[Callable[[_Parser], None], Callable[[argparse.Namespace], int], str]] = {
    "train": (_add_train, _train, "Distil a teacher into a student, as described by a run config."),
    "plan": (_add_plan, _plan, "Estimate memory and time of a run without loading a model."),
    "cache": (_add_config, _cache, "Cache the teachers' outputs for the training rows on disk."),
    "encode": (_add_encode, _encode, "Encode the data of a run into a folder, before the run."),
    "evaluate": (_add_evaluate, _evaluate, "Score a model on a run's held-out rows, or on a file."),
    "shrink": (add_shrink_options, _shrink, "Cut a decoder to a size, and repair it."),
    "export": (_add_export, _export, "Write a finished stage as a Hugging Face folder."),
    "report": (_add_report, _report, "Write the report.html of a finished run again."),
    "methods": (_add_methods, _methods, "List the methods, or the loss terms, with their options."),
}
