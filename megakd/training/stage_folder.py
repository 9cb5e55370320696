"""The folder of a finished stage: its models, and its result, which a later start reads.

    stages/<stage>/           the model of the stage's role, and result.json
    stages/<stage>/<role>/    a model that learned beside it, with checksums of its own
    stages/<stage>/training_state/    see `window_state`

The whole folder is written completely or not at all.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.config.run import RunConfig
from megakd.contract.stage import StageResult
from megakd.contract.tasks import STUDENT
from megakd.engine.collectives import on_main
from megakd.errors import CheckpointError
from megakd.models.model_folder import Extra, fill_model_folder, write_model_folder
from megakd.scoring.scores import numbers
from megakd.storage import atomic
from megakd.storage.fingerprint import ABSENT, Fingerprint, as_read_back, differences
from megakd.storage.folders import CHECKSUMS, open_finished, sealed_folder, write_finished

if TYPE_CHECKING:
    from megakd.models.cutting import Learned
    from megakd.training.window_state import WindowState

logger = logging.getLogger(__name__)
RESULT = "result.json"
ROWS_PER_STEP = "rows_per_step"
"""Key in the section `train` of a fingerprint, for the keys that split a step over the ranks."""
LENGTHS = tuple(
    f"{section}.{key}"
    for section in ("train", "alone")
    for key in ("max_steps", "num_train_epochs")
)


def files_of_others(names: Iterable[str]) -> list[str]:
    """Return, of the files of a stage's folder, those of the models that learned beside its own."""
    known = list(names)
    roles = {name.removesuffix(f"/{CHECKSUMS}") for name in known if name.endswith(f"/{CHECKSUMS}")}
    return [name for name in known if name.partition("/")[0] in roles]


def consume(models: Mapping[str, Learned], window: WindowState | None) -> None:
    """Iterate over the rest of all states, which contain collectives."""
    for model in models.values():
        deque(model.state, maxlen=0)
    if window is not None:
        deque(window.tensors, maxlen=0)


def write_stage_folder(
    folder: Path, models: Mapping[str, Learned], *, extra: Extra, window: WindowState | None = None
) -> None:
    """Write the models of a stage completely or not at all; call on the rank that writes.

    Args:
        folder: replaced as a whole after everything is written and synced.
        models: by role; the first is written into `folder` itself. All states are consumed even if
            writing fails.
        extra: small files that belong to `folder`.
        window: the training state, if the next window of the run continues.
    """
    (first, *_), others = models.values(), list(models.items())[1:]
    try:
        with sealed_folder(folder) as temporary:
            files = {**first.extra, **extra}
            fill_model_folder(temporary, **first._replace(extra=files)._asdict())
            for role, model in others:
                write_model_folder(temporary / role, **model._asdict())
            if window is not None:
                window.write(temporary)
    finally:
        consume(models, window)


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

    With `may_grow`, a result of fewer steps may be continued, see `is_longer`.

    Raises:
        CheckpointError: the folder is damaged, or holds the result of another config.
    """
    # Only rank 0 reads: on a network disk, other ranks may not see the files yet.
    stored = on_main(lambda: _result_there(folder))
    if stored is None:
        return None
    result, there = stored
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
            f"use that config again{same_rows(there, here)}, or remove the folder; to train this "
            "model further, set "
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


def same_rows(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return how to get the rows of a step that a fingerprint has, if another has others."""
    rows = there.get(f"train.{ROWS_PER_STEP}")
    if rows in (None, here.get(f"train.{ROWS_PER_STEP}")):
        return ""
    product = "per_device_train_batch_size x gradient_accumulation_steps x ranks"
    return f" ({product} must be {rows}, so the ranks must divide {rows})"


def is_longer(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Return true if two flat configs or fingerprints differ only in increased lengths."""
    changed = [k for k in {*there, *here} if there.get(k, ABSENT) != here.get(k, ABSENT)]
    return bool(changed) and all(_is_raised(there, here, key) for key in changed)


def _is_raised(there: Mapping[str, Any], here: Mapping[str, Any], key: str) -> bool:
    before, now = there.get(key), here.get(key)
    return key in LENGTHS and before is not None and now is not None and now > before


def keeps_last(fields: Mapping[str, Any]) -> bool:
    """Return true if no evaluation decides which weights a run of this flat config keeps."""
    best = fields.get("eval.keep_best")
    chooses = best or (best is None and fields.get("eval.eval_steps") is not None)
    return not (chooses or any(fields[k] for k in fields if k.endswith("early_stopping_patience")))


def may_grow(stage: str, config: RunConfig) -> bool:
    """Return true for a stage that no other stage is made from: the student's and the baselines'.

    If a teacher or an assistant continued to learn, its students would belong to an older teacher.
    """
    return stage in (STUDENT, *config.baselines)
