"""Cache the teachers' outputs for the training rows on disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from megakd.commands.arguments import add_config, config_of, say
from megakd.config.run import RunConfig
from megakd.errors import ConfigError
from megakd.process.terminal import print_aside

add_options = add_config


def run(arguments: argparse.Namespace) -> None:
    """Write the caches of a config and print their folders."""
    config = config_of(arguments)
    with print_aside():
        folders = _cache_teachers(config)
    say("\n".join(map(str, folders)))


def _cache_teachers(config: RunConfig) -> list[Path]:
    names = [name for name, spec in config.teacher_specs.items() if spec.cache is not None]
    if not names:
        raise ConfigError(
            "no teacher has a cache: set teacher.cache (of several teachers: teachers[0].cache, …) "
            "to a folder for the outputs of the teacher"
        )
    from megakd.engine.nodes import check_nodes
    from megakd.inputs.inputs import prepare
    from megakd.inputs.precision import check_device
    from megakd.run.holder import held
    from megakd.run.main import reporter_of, started
    from megakd.run.run_lab import RunLab
    from megakd.training.label_check import check_label_orders

    with started(config) as ranks, held(config.output_dir):
        check_device(config, ranks)
        check_nodes(config)
        reporter = reporter_of(config, ranks)
        try:
            prepared = prepare(config)
            lab = RunLab(prepared, ranks, reporter)
            check_label_orders(lab.assembly)
            return [lab.cache(lab.teacher(name)) for name in names]
        finally:
            reporter.close()
