"""result.json: the result of a finished stage, read only after its folder is verified."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from megakd.contract.stage import StageResult
from megakd.engine.collectives import on_main
from megakd.errors import CheckpointError
from megakd.storage import atomic
from megakd.storage.fingerprint import Fingerprint, as_read_back, differences
from megakd.storage.finished_folder import open_finished, write_finished
from megakd.training.evaluation import numbers
from megakd.training.longer import is_longer

logger = logging.getLogger(__name__)
RESULT = "result.json"


def result_text(result: StageResult, fingerprint: Fingerprint) -> str:
    """Return the content of result.json: the result of a stage, and its fingerprint."""
    record = asdict(result) | {"folder": None, "fingerprint": fingerprint}
    return atomic.json_text(record, indent=2)


def write_result(result: StageResult, fingerprint: Fingerprint) -> None:
    """Write the folder of a stage that has no model, only a result; a collective."""
    files = {RESULT: result_text(result, fingerprint)}
    on_main(lambda: write_finished(result.folder, files))


def read_result(
    folder: Path, fingerprint: Fingerprint, *, may_grow: bool = False
) -> StageResult | None:
    """Return a finished stage's result; None if the stage has steps to take; a collective.

    Args:
        folder: the folder of the stage.
        fingerprint: what the result depends on.
        may_grow: whether a result of fewer steps may be continued, see `longer`.

    Raises:
        CheckpointError: the folder is damaged, or holds the result of another config; the message
            names the differing fields.
    """
    # Only rank 0 reads: on a network disk, other ranks may not see the files yet.
    found = on_main(lambda: _result_there(folder))
    if found is None:
        return None
    result, there = found
    here = as_read_back(fingerprint)
    if may_grow and is_longer(there, here):
        logger.info(
            "%s: finished with %d steps and continues (%s); from there the learning rate follows "
            "the schedule of the longer run",
            result.name,
            result.steps,
            differences(there, here),
        )
        return None
    differing = differences(there, here)
    if differing:
        raise CheckpointError(
            f"{folder} holds the result of another config ({differing}); use another output_dir, "
            "use that config again, or remove the folder; to train this model further, set "
            f"student.model={folder} and another output_dir"
        )
    return result


def _result_there(folder: Path) -> tuple[StageResult, Fingerprint] | None:
    if not folder.exists():
        return None
    path, remedy = folder / RESULT, remake(folder)
    open_finished(folder, remedy=remedy)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        fingerprint = dict(record.pop("fingerprint"))
        read = {
            "folder": folder,
            "metrics": numbers(record["metrics"]),
            "scores": {view: numbers(values) for view, values in record["scores"].items()},
        }
        return StageResult(**{**record, **read}), fingerprint
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a result of this version ({error}); {remedy}"
        ) from error


def remake(folder: Path) -> str:
    """Return instructions for making a damaged stage folder again."""
    report = folder.parent.parent / "report.json"
    also = f" and {report}" if report.is_file() else ""
    return (
        f"remove {folder}{also} and start the same command again: the stage runs again, from its "
        "last checkpoint if there is one"
    )
