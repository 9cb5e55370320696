"""Cut a decoder to a size, and repair it."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import Any

from megakd.commands.arguments import Parser, say
from megakd.commands.plan import print_plan
from megakd.commands.train import train
from megakd.config.file import config_of, dump_config, dump_yaml, with_overrides
from megakd.config.run import RunConfig
from megakd.contract.tasks import FROM_TEACHER
from megakd.errors import ConfigError
from megakd.process.terminal import in_home
from megakd.storage.atomic import write_text

FILE = "shrink.yaml"
SOURCE = "the config of megakd shrink"


def add_options(parser: Parser) -> None:
    """Add the model, the size, the text and the place of the result."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="the decoder to shrink: a folder or a Hub id"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="further settings of the run, such as train.learning_rate=3e-5",
    )
    parser.add_argument(
        "--parameters", metavar="N", help="weights of the student: 0.6B, 600M or 600000000"
    )
    parser.add_argument(
        "--data", metavar="F", help="the text to learn from; the same as task.dataset=F"
    )
    parser.add_argument(
        "--output_dir",
        "--output-dir",
        metavar="D",
        type=in_home,
        help=f"the folder of the run and of {FILE}; default: runs/<model>-<size>",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="R",
        help=f"for R above 1, write {FILE} and print the command that starts R ranks on this node",
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--plan", action="store_true", help="print memory and time of the run and stop"
    )
    either.add_argument(
        "--print-config", action="store_true", help="print the resolved config and stop"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the config of the options and run it, or print the config, the plan or the launch."""
    config, text = _config(arguments)
    if arguments.print_config:
        say(dump_config(config))
    elif arguments.plan:
        print_plan(config, arguments)
    else:
        path = config.output_dir / FILE
        write_text(path, text)
        if arguments.ranks == 1:
            train(config, arguments.command)
        else:
            launcher = ("deepspeed", "--num_gpus", str(arguments.ranks), "launch/train.py")
            say(shlex.join([*launcher, "--config", str(path)]))


def _config(arguments: argparse.Namespace) -> tuple[RunConfig, str]:
    _check(arguments)
    tree = with_overrides(_tree(arguments), arguments.overrides, source=SOURCE)
    if not _has_text(tree["task"]):
        raise ConfigError("the text to learn from is missing; give --data F, or task.dataset=F")
    # The overrides are given again, so that a message names the override that is wrong.
    config = config_of(_tree(arguments), arguments.overrides, source=SOURCE)
    return config, f"# Written by: {arguments.command}\n{dump_yaml(tree)}"


def _check(arguments: argparse.Namespace) -> None:
    usage = "megakd shrink MODEL --parameters 0.6B --data FILE"
    if arguments.model is None or ("=" in arguments.model and not Path(arguments.model).exists()):
        raise ConfigError(f"the model to shrink is missing; write: {usage}")
    size = ("method.parameters=", "method.target_sparsity=")
    if arguments.parameters is None and not any(o.startswith(size) for o in arguments.overrides):
        raise ConfigError(f"--parameters is missing, the size of the student; write: {usage}")
    if arguments.ranks < 1:
        raise ConfigError(f"--ranks must be at least 1 (got {arguments.ranks})")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "megakd shrink runs on one rank, and a launcher has started "
            f"{os.environ['WORLD_SIZE']}; write the config with --ranks "
            f"{os.environ['WORLD_SIZE']}, and start the command that is printed"
        )


def _tree(arguments: argparse.Namespace) -> dict[str, Any]:
    task: dict[str, Any] = {"type": "causal_lm", "max_eval_examples": 200}
    method: dict[str, Any] = {"name": "shrink", "passes_per_backward": 1}
    if arguments.data is not None:
        task["dataset"] = arguments.data
    if arguments.parameters is not None:
        method["parameters"] = arguments.parameters
    return {
        "output_dir": str(arguments.output_dir or _folder(arguments)),
        "task": task,
        "teacher": {"model": arguments.model},
        "student": {"model": FROM_TEACHER},
        "method": method,
        "train": {"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_ratio": 0.03},
    }


def _folder(arguments: argparse.Namespace) -> Path:
    model = Path(arguments.model).name or "model"
    size = arguments.parameters or "smaller"
    return Path("runs") / re.sub(r"[^\w.-]+", "-", f"{model}-{size}")


def _has_text(task: Any) -> bool:
    keys = ("dataset", "train_files", "mixture", "encoded")
    return isinstance(task, dict) and any(task.get(key) is not None for key in keys)
