"""Cache the teachers' outputs for the training rows on disk."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path

from megakd.commands.arguments import add_config, config_of_arguments, say
from megakd.config.run import RunConfig
from megakd.errors import ConfigError
from megakd.process.terminal import print_aside

add_options = add_config


def run(arguments: argparse.Namespace) -> None:
    """Write the caches of a config and print their folders."""
    config = config_of_arguments(arguments)
    caches = {n: s.cache for n, s in config.teacher_specs.items() if s.cache is not None}
    if not caches:
        raise ConfigError(
            "no teacher has a cache: set teacher.cache (of several teachers: teachers[0].cache, …) "
            "to a folder for the outputs of the teacher"
        )
    with print_aside():
        from megakd.engine.collectives import on_main
        from megakd.engine.distributed import check_nodes
        from megakd.run.finished_run import begin_run
        from megakd.run.holder import locked_on_main
        from megakd.run.main import reporter_of, started
        from megakd.run.run_work import RunWork
        from megakd.training.inputs import prepare
        from megakd.training.lab import Lab
        from megakd.training.precision import check_device

        with started(config) as ranks, ExitStack() as locks:
            # Runs with other output folders may share a cache.
            for folder in on_main(lambda: _held_folders(config, caches.values())):
                locks.enter_context(locked_on_main(folder))
            check_device(config, ranks)
            check_nodes(config)
            with closing(reporter_of(config, ranks)) as reporter:
                lab = Lab(RunWork(prepare(config), ranks, reporter))
                on_main(lambda: begin_run(config, ranks))  # stages may be made below
                folders = [lab.work.cache(lab.teacher(name)) for name in caches]
    say("\n".join(map(str, folders)))


def _held_folders(config: RunConfig, caches: Iterable[Path | str]) -> list[Path]:
    # A cache that cannot be written can only be read.
    shared = (
        c for c in caches if isinstance(c, Path) and (not c.exists() or os.access(c, os.W_OK))
    )
    return list(dict.fromkeys(map(Path.resolve, (config.output_dir, *shared))))
