"""Fill the cache with the encoded data of a run, before the run."""

from __future__ import annotations

import argparse

from megakd.commands.arguments import add_config, config_of_arguments, say
from megakd.process.terminal import print_aside

add_options = add_config


def run(arguments: argparse.Namespace) -> None:
    """Read and encode the data of a config as its run does, and print where the rows are."""
    config = config_of_arguments(arguments)
    with print_aside():
        from megakd.run.main import started
        from megakd.training.inputs import cache_folder, prepare

        with started(config):
            encoded = prepare(config).encoded
    rows = {"training": encoded.train, "validation": encoded.validation, "test": encoded.test}
    counts = ", ".join(f"{len(part):,} {name}" for name, part in rows.items() if part)
    say(f"{cache_folder()}: {counts} rows, {encoded.tokens_per_row:,.1f} tokens per row")
