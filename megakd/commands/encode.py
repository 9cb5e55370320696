"""Encode the data of a run into a folder, before the run."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from megakd.commands.arguments import Parser, add_config, config_of, named_folder, say
from megakd.config.run import RunConfig
from megakd.errors import ConfigError
from megakd.process.terminal import print_aside
from megakd.storage.folders import check_writable


def add_options(parser: Parser) -> None:
    """Add the config and the folder to write."""
    add_config(parser)
    parser.add_argument(
        "--to",
        metavar="FOLDER",
        type=named_folder,
        help="the folder to write, default: task.encoded",
    )


def run(arguments: argparse.Namespace) -> None:
    """Encode the data of a run and print the setting that reads the folder."""
    config = config_of(arguments)
    with print_aside():
        folder = encode_run(config, arguments.to)
    say(f"the run reads the encoded data with task.encoded={folder}")


def encode_run(config: RunConfig, folder: Path | None) -> Path:
    """Encode the data of a run into a folder that `task.encoded` of the run can name.

    Only rank 0 works. A call that was stopped goes on after its last whole shard, and a finished
    folder with the same data is left as it is.
    """
    target = folder or config.task.encoded
    if target is None:
        raise ConfigError("--to is missing; give the folder for the encoded data")
    if config.task.streaming or config.method.own_vocabulary is not None:
        key = "task.streaming" if config.task.streaming else "method.student_vocabulary"
        raise ConfigError(f"{key}: a run with this key reads the texts, and no encoded data")
    if config.method.routes_rows:
        raise ConfigError(
            f"method.name: {config.method.name} reads the texts, whose rows name their teachers, "
            "and no encoded data"
        )
    from megakd.data.encoded_folder import MANIFEST, facts_of, write_encoded
    from megakd.engine.collectives import on_main
    from megakd.inputs.inputs import check_run, unencoded_inputs
    from megakd.inputs.run_data import with_row_length
    from megakd.run.holder import written_once
    from megakd.run.main import started

    check_writable(target, where="--to")
    config = replace(config, task=replace(config.task, encoded=None))
    with started(config):
        inputs = unencoded_inputs(config)
        config = with_row_length(config, inputs.splits, inputs.tokenizer, inputs.sources)
        task = config.task
        check_run(config, inputs)
        facts = facts_of(task, inputs.tokenizer, seed=config.seed)

        def write() -> None:
            # A finished folder is only compared, and may be on read-only storage.
            is_done = (target / MANIFEST).is_file()
            with nullcontext() if is_done else written_once(target):
                write_encoded(target, inputs.splits, inputs.tokenizer, task, facts=facts)

        on_main(write)
    return target
