"""The model that `megakd evaluate` scores: a given folder, or the run's `final/`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megakd.errors import CheckpointError
from megakd.models.loading import resolve_model
from megakd.process.terminal import in_home
from megakd.run.finished_run import FINAL

if TYPE_CHECKING:
    from megakd.config.run import RunConfig
    from megakd.models.source import ModelSource


def model_folder(config: RunConfig, model: str | None) -> Path:
    """Return the given folder, or the run's `final/` if no folder is given.

    Raises:
        CheckpointError: the folder does not exist.
    """
    folder = in_home(model) if model else config.output_dir / FINAL
    if folder.is_dir():
        return folder
    if model:
        raise CheckpointError(
            f"--model {model}: the folder does not exist; give the folder of a model, such as a "
            "run's final/ or stages/<stage>"
        )
    raise CheckpointError(f"{folder} does not exist; train first, or give --model FOLDER")


def scored_model(config: RunConfig, folder: Path) -> ModelSource:
    """Return the source of the model in a folder, read with the permissions of the student.

    `student.allow_pickle` and `student.trust_remote_code` are settings that a user can add to the
    command; messages name them.

    Raises:
        ModelError: see `resolve_model`.
    """
    student = config.student
    return resolve_model(
        str(folder),
        config.task,
        where="student.model (--model)",
        trust_remote_code=student.trust_remote_code,
        allow_pickle=student.allow_pickle,
    )
