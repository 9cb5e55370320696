"""The folder that `megakd evaluate --tasks` scores, and the folder of the scores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from megakd.config.file import load_config
from megakd.errors import CheckpointError, ConfigError
from megakd.process.home import in_home

RESULTS = "lm_eval.json"
"""File of the scores, beside the report of the run."""


class ScoredFolder(NamedTuple):
    """A model folder, and the folder that the scores are written to."""

    model: Path
    out: Path


def scored_folder(arguments: argparse.Namespace) -> ScoredFolder:
    """Return the model folder of the command, and the folder for its scores.

    Raises:
        MegakdError: no folder is given, or the folder holds no model.
    """
    settings = list(arguments.overrides)
    given = arguments.config
    if given is None and settings and "=" not in settings[0]:
        given = in_home(settings.pop(0))
    if given is not None and not given.is_dir():
        given = load_config(given, settings).output_dir
    elif settings:
        raise ConfigError(f"{settings[0]}: settings apply to a config, and none is given")
    model = None if arguments.model is None else in_home(arguments.model)
    out = given or model
    if out is None:
        raise ConfigError("give a run's config or output_dir, or a model folder")
    return _in_folder(out, model)


def _in_folder(out: Path, model: Path | None) -> ScoredFolder:
    chosen = model or (out if (out / "config.json").is_file() else out / "final")
    if not (chosen / "config.json").is_file():
        raise CheckpointError(
            f"{chosen} holds no model: config.json is missing; give the output_dir of a finished "
            "run, or the folder of a model"
        )
    # The scores of final/ belong beside the report, and final/ keeps the files of the run alone.
    return ScoredFolder(chosen, out.resolve().parent if out.name == "final" else out)
