"""The command line: `launch/train.py` and `megakd train | plan | evaluate | export | report | …`.

A user error is reported as one message on stderr, only by rank 0, with exit code 2. Torch is
imported only when a command needs it.
"""

from __future__ import annotations

import errno
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from types import ModuleType

from packaging.version import Version

from megakd.commands import (
    answer,
    cache,
    encode,
    evaluate,
    export,
    methods,
    plan,
    report,
    shrink,
    train,
)
from megakd.commands.arguments import Parser, say
from megakd.errors import ConfigError, MegakdError, PeerLostError, suggestion
from megakd.process.signals import Stopped, watched
from megakd.process.terminal import is_first_of_node, is_rank_0

_USER_ERROR = 2
_OWNER = "change its owner or mode, or that of a parent"
_CURES = {
    errno.EACCES: _OWNER,
    errno.EPERM: _OWNER,
    errno.EROFS: "give a folder that can be written",
    errno.ENAMETOOLONG: "give a shorter one",
}
"""What helps against an error of the file system, by its number."""
# pip asks for it too, but a copy of the sources may run in an environment that pip did not make.
_LEAST_TORCH = "2.11"


# A command is a module that is named like it, with its options, its code, and a line on it.
_COMMANDS: Mapping[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (train, plan, cache, encode, answer, evaluate, shrink, export, report, methods)
}


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run `megakd train`, like `main`; the main function of `launch/train.py`."""
    words = sys.argv[1:] if argv is None else argv
    return _guarded(lambda: _run_command("train", words, prog="launch/train.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `megakd` command.

    Args:
        argv: arguments without the program; None takes the arguments of the process.

    Returns:
        The exit code: 0 for success, 2 for an error that the user has to correct.
    """
    words = sys.argv[1:] if argv is None else argv
    return _guarded(lambda: _dispatch(words))


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:10}{inspect.getdoc(command)}" for name, command in _COMMANDS.items()]
        usage = "usage: megakd {" + ",".join(_COMMANDS) + "} ...\n"
        say("\n".join([usage, *lines, "\nSee also: megakd COMMAND --help, megakd --version."]))
        return 0 if words else _USER_ERROR
    if words[0] in ("-V", "--version"):
        say(f"megakd {version('megakd')}")
        return 0
    name, *rest = words
    if name not in _COMMANDS:
        near = suggestion(name, _COMMANDS)
        raise ConfigError(f'unknown command "{name}"{near or ";"} known: {", ".join(_COMMANDS)}')
    return _run_command(name, rest, prog=f"megakd {name}")


def _run_command(name: str, words: Sequence[str], *, prog: str) -> int:
    installed = version("torch")
    if Version(installed) < Version(_LEAST_TORCH):
        raise ConfigError(f"torch {installed} is installed; megakd needs {_LEAST_TORCH} or newer")
    command = _COMMANDS[name]
    parser = Parser(prog=prog, description=inspect.getdoc(command) or "")
    command.add_options(parser)
    # Before torch's first allocation: a sharded model is gathered in every forward, and in small
    # pages the system takes as long to provide the memory as the ranks take to fill it.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return command.run(parser.parse(words)) or 0


def _guarded(command: Callable[[], int]) -> int:
    try:
        with watched():
            return command()
    except Stopped as stop:
        if is_rank_0():
            sys.stderr.write(f"megakd: {stop}\n")
        return stop.exit_code
    except PeerLostError as error:
        sys.stderr.write(f"megakd: {error}\n")  # by every rank: rank 0 may be the lost one
        return error.exit_code
    except MegakdError as error:
        if is_first_of_node() or error.of_one_rank:
            sys.stderr.write(f"megakd: error: {error}\n")
        return error.exit_code
    except OSError as error:  # of any file or folder, on any rank
        if error.filename is None or error.errno not in _CURES:
            raise
        what = f"{error.filename}: {str(error.strerror).lower()}; {_CURES[error.errno]}"
        sys.stderr.write(f"megakd: error: {what}\n")
        return _USER_ERROR
