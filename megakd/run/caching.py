"""`megakd cache`: writes the caches of a run config, each with the answers of one teacher."""

from __future__ import annotations

from pathlib import Path

from megakd.config.run import RunConfig
from megakd.engine.nodes import check_nodes
from megakd.errors import ConfigError
from megakd.inputs.inputs import prepare
from megakd.inputs.precision import check_device
from megakd.run.holder import held
from megakd.run.lab import Lab
from megakd.run.main import reporter_of, started
from megakd.training.label_check import check_label_orders


def cache_teachers(config: RunConfig) -> list[Path]:
    """Fine-tune the teachers if the config asks for it, and cache their answers; a collective.

    Returns:
        The folders of the caches.

    Raises:
        ConfigError: no teacher of the config has a cache.
        MegakdError: the input is invalid, or a folder holds other answers.
    """
    named = [name for name, spec in config.teacher_specs.items() if spec.cache is not None]
    if not named:
        raise ConfigError(
            "no teacher has a cache: set teacher.cache (of several teachers: teachers[0].cache, …) "
            "to a folder for the outputs of the teacher"
        )
    with started(config) as ranks, held(config.output_dir):
        check_device(config, ranks)
        check_nodes(config)
        reporter = reporter_of(config, ranks)
        try:
            prepared = prepare(config)
            lab = Lab(prepared.config, prepared, ranks, reporter)
            check_label_orders(lab.assembly)
            return [lab.cache(lab.teacher(name)) for name in named]
        finally:
            reporter.close()
