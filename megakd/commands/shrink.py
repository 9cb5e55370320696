"""Cut a model to a budget, and repair it."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from megakd.commands.arguments import Parser, named_folder, say
from megakd.commands.plan import print_plan
from megakd.commands.recipes import shrink_tree
from megakd.commands.train import train
from megakd.config.file import config_of, dump_config, dump_yaml, load_config, with_overrides
from megakd.config.run import RunConfig
from megakd.errors import ConfigError
from megakd.process.atomic import write_text
from megakd.process.folders import check_writable
from megakd.process.run_folder import REPORT

FILE = "shrink.yaml"
EXAMPLES = {"parameters": "0.6B", "flops": "12%", "speedup": "8x"}
"""Options of the size, which are options of the method too, with an example of each."""
SOURCE = "the config of megakd shrink"


def add_options(parser: Parser) -> None:
    """Add the model, the size, the text and the place of the result."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="the model to shrink: a folder or a Hub id"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="further settings of the run, such as train.learning_rate=3e-5",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--parameters", metavar="N", help="weights of the student: 0.6B, 600M or 600000000"
    )
    size.add_argument("--flops", metavar="S", help="share of the layers' operations: 12%% or 0.12")
    size.add_argument("--speedup", metavar="X", help="how much faster than the model: 8x")
    parser.add_argument(
        "--data", metavar="F", help="the rows to learn from; the same as task.dataset=F"
    )
    parser.add_argument(
        "--output_dir",
        "--output-dir",
        metavar="D",
        type=named_folder,
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
        return
    if arguments.plan:
        print_plan(config, arguments)
        return
    out, path = config.output_dir, config.output_dir / FILE
    check_writable(out, where="--output_dir")
    if not (out / REPORT).exists():
        write_text(path, text)
    # One rank is told by the run itself.
    elif arguments.ranks > 1 and not (path.exists() and load_config(path) == config):
        raise ConfigError(
            f"{out} holds a finished run of other settings; give another --output_dir"
        )
    if arguments.ranks == 1:
        train(config, arguments.command)
    else:
        launcher = ("deepspeed", "--num_gpus", str(arguments.ranks), "launch/train.py")
        say(shlex.join([*launcher, "--config", str(path)]))


def _config(arguments: argparse.Namespace) -> tuple[RunConfig, str]:
    size = {key: getattr(arguments, key) for key in EXAMPLES}
    size = {key: value for key, value in size.items() if value is not None}
    _check(arguments, has_size=bool(size))
    ours = shrink_tree(
        arguments.model,
        size=size,
        data=arguments.data,
        words=arguments.overrides,
        output_dir=arguments.output_dir,
    )
    # The recipe of a fine-tuning is in the tree.
    words = [word for word in arguments.overrides if word != "teacher.finetune={}"]
    tree = with_overrides(ours, words, source=SOURCE)
    task, keys = tree["task"], ("dataset", "train_files", "mixture")
    if not (isinstance(task, dict) and any(task.get(key) is not None for key in keys)):
        raise ConfigError("the rows to learn from are missing; give --data F, or task.dataset=F")
    # The overrides are given again, so that a message names the override that is wrong.
    config = config_of(ours, words, source=SOURCE)
    comment = "\n".join(f"# {line}" for line in f"Written by: {arguments.command}".splitlines())
    return config, f"{comment}\n{dump_yaml(tree)}"


def _check(arguments: argparse.Namespace, *, has_size: bool) -> None:
    sizes = " | ".join(f"--{key} {example}" for key, example in EXAMPLES.items())
    usage = f"megakd shrink MODEL {sizes} --data FILE"
    if arguments.model is None or ("=" in arguments.model and not Path(arguments.model).exists()):
        raise ConfigError(f"the model to shrink is missing; write: {usage}")
    settings = tuple(f"method.{key}=" for key in EXAMPLES)
    if not has_size and not any(word.startswith(settings) for word in arguments.overrides):
        raise ConfigError(f"the size of the student is missing; write: {usage}")
    if arguments.ranks < 1:
        raise ConfigError(f"--ranks must be at least 1 (got {arguments.ranks})")
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1":
        raise ConfigError(
            f"megakd shrink runs on one rank, and a launcher has started {started}; write the "
            f"config with --ranks {started}, and start the command that is printed"
        )
