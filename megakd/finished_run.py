"""What an output folder holds of a finished run: its table, its student, its stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megakd import atomic
from megakd.best import RECORD
from megakd.config import RunConfig
from megakd.config_file import config_tree, load_config
from megakd.errors import CheckpointError, ConfigError
from megakd.fingerprint import differences, flatten
from megakd.report_table import result_table
from megakd.stage_run import RESULT
from megakd.yaml12 import parse_yaml

REPORT = "report.json"
CONFIG = "config.yaml"
FINAL = "final"


def finished_table(config: RunConfig) -> str | None:
    """The table of a run that has finished; None where there is something left to do.

    Raises:
        CheckpointError: the folder holds another config's finished run.
    """
    report = config.output_dir / REPORT
    if not report.is_file() or config.train.resume_from_checkpoint is False:
        return None
    differing = config_differences(config)
    if differing:
        raise CheckpointError(
            f"{config.output_dir} holds a finished run of another config ({differing}); use "
            f"another output_dir, or go back to that config"
        )
    content = json.loads(report.read_text(encoding="utf-8"))
    return result_table(content, final=config.output_dir / FINAL)


def config_differences(config: RunConfig) -> str:
    """How the config that is in the output folder differs in what a result depends on."""
    there, here = flatten(_config_there(config.output_dir / CONFIG)), flatten(config_tree(config))
    return differences(
        {k: v for k, v in there.items() if not _is_free(k)},
        {k: v for k, v in here.items() if not _is_free(k)},
    )


def _config_there(path: Path) -> Any:
    """What a run was started with, in all keys that there are by now."""
    if not path.is_file():
        return {}
    try:
        return config_tree(load_config(path))
    except ConfigError:  # of a version whose keys are no longer known: they are shown as they are
        return parse_yaml(path.read_text(encoding="utf-8"), source=str(path))


def _is_free(key: str) -> bool:
    """Whether a key may change between two starts of one run."""
    return key.startswith(("output_dir", "log.", "save.")) or key.endswith(
        ("resume_from_checkpoint", "per_device_eval_batch_size")
    )


def model_folder(config: RunConfig, model: str | None) -> Path:
    """The folder to look at: the one given, else the run's `final/`.

    Raises:
        CheckpointError: it does not exist.
    """
    folder = Path(model) if model else config.output_dir / FINAL
    if folder.is_dir():
        return folder
    if model:
        raise CheckpointError(
            f"--model {model}: there is no such folder; give the folder of a model, such as a "
            "run's final/ or stages/<stage>"
        )
    raise CheckpointError(f"{folder} does not exist; train first, or give --model FOLDER")


def export_run(config: RunConfig, stage: str | None, to: Path) -> Path:
    """Copies a finished stage's model, by default the student's, to a folder of its own.

    Raises:
        CheckpointError: the stage has not finished, or the folder exists.
    """
    stages = config.output_dir / "stages"
    name = stage or "student"
    if not (stages / name / RESULT).is_file():
        finished = sorted(path.parent.name for path in stages.glob(f"*/{RESULT}"))
        raise CheckpointError(
            f"stage {name!r} of {config.output_dir} has not finished; finished: "
            f"{', '.join(finished) or 'none'}"
        )
    if to.exists():
        raise CheckpointError(f"{to} exists already; give a folder that does not")
    atomic.copy_folder(stages / name, to, changes={RESULT: None, RECORD: None})
    return to
