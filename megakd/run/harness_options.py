"""The options of `megakd evaluate --tasks`, without importing torch so that `--help` is fast."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from megakd.errors import ConfigError
from megakd.process.home import in_home
from megakd.process.quiet_stdout import print_aside
from megakd.run.scored_folder import RESULTS, scored_folder
from megakd.storage.atomic import json_text

_OTHERS = ("data", "submission", "trust_label_order")
_OWN = ("include_path", "limit", "apply_chat_template", "trust_remote_code")


def add_tasks_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that score a model on tasks of lm-eval; the names are those of lm-eval."""
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="score on tasks of lm-eval, separated by commas, such as gsm8k,ifeval; F is then a "
        f"run's config or output_dir, or a model folder; writes {RESULTS}",
    )
    parser.add_argument(
        "--include_path", metavar="DIR", type=in_home, help="with --tasks: folder of further tasks"
    )
    parser.add_argument(
        "--limit", metavar="N", type=int, help="with --tasks: only the first N rows of each task"
    )
    parser.add_argument(
        "--apply_chat_template",
        action="store_true",
        help="with --tasks: render the prompts with the chat template of the model",
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="with --tasks: run the model code that is in the folder",
    )


def score_tasks(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Run `megakd evaluate --tasks`; return the exit code 0.

    Args:
        arguments: the parsed options of `megakd evaluate`.
        say: function that prints the table.

    Raises:
        MegakdError: the options do not fit each other, or the model cannot be scored.
    """
    _check(arguments)
    folder = scored_folder(arguments)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    with print_aside():
        from megakd.run.harness import evaluate_tasks

        found = evaluate_tasks(
            folder,
            names,
            include_path=arguments.include_path,
            limit=arguments.limit,
            chat_template=arguments.apply_chat_template,
            trust_remote_code=arguments.trust_remote_code,
        )
    from megakd.reports.scores import task_scores_text

    say(json_text(found, indent=2) if arguments.json else task_scores_text(found))
    return 0


def is_of_tasks(arguments: argparse.Namespace) -> bool:
    """Return whether the command scores a model on tasks of lm-eval.

    Raises:
        ConfigError: an option that only `--tasks` reads is given without `--tasks`.
    """
    if arguments.tasks is not None:
        return True
    given = next((name for name in _OWN if getattr(arguments, name) not in (None, False)), None)
    if given is not None:
        raise ConfigError(f"--{given} applies to --tasks alone; add --tasks, or remove --{given}")
    return False


def _check(arguments: argparse.Namespace) -> None:
    given = next((name for name in _OTHERS if getattr(arguments, name)), None)
    if given is not None:
        raise ConfigError(f"--{given} cannot be combined with --tasks; remove one of the two")
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {arguments.limit}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"--tasks runs in one process, and the launcher has started "
            f"{os.environ['WORLD_SIZE']}; start megakd evaluate without a launcher"
        )
