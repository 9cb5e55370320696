"""The folder of a finished stage: its models, and its result, which a later start reads.

    stages/<stage>/           the model of the stage's role, and result.json
    stages/<stage>/<role>/    a model that learned beside it, with checksums of its own
    stages/<stage>/training_state/    whole tensors in fp32, as safetensors, and rest.pt: the state
                              with which the next window of a run continues

The whole folder is written completely or not at all.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megakd.config.run import RunConfig
from megakd.config.sections import TrainConfig
from megakd.config.task import STUDENT
from megakd.data.batch import BatchSource
from megakd.engine.collectives import gather, on_main
from megakd.engine.distributed import Ranks
from megakd.engine.optimizer_state import AVERAGES, LEARNER
from megakd.errors import CheckpointError
from megakd.models.cutting import cut_state
from megakd.models.model_folder import (
    Extra,
    ModelContent,
    fill_model_folder,
    write_model_folder,
    write_weights,
)
from megakd.models.views import Axes, Cut
from megakd.models.weights import WeightReader, check_weight_files
from megakd.process import files
from megakd.process.record import RESULT, differences
from megakd.process.seals import (
    CHECKSUMS,
    check_given,
    sealed_folder,
    verified_entries,
    write_finished,
)
from megakd.process.seeding import random_state, set_random_state
from megakd.stage import Stage, StageResult
from megakd.training.metrics import numbers
from megakd.training.student import StudentEngine

logger = logging.getLogger(__name__)
TRAINING_STATE, REST = "training_state", "rest.pt"
LENGTHS = ("max_steps", "num_train_epochs")
Length = Mapping[str, float | None]
"""The keys of `LENGTHS` of a stage; empty for a stage without steps."""


def files_beside_model(names: Iterable[str]) -> list[str]:
    """Return, of the files of a stage's folder, those that are not of the model of its role."""
    known = list(names)
    roles = {name.removesuffix(f"/{CHECKSUMS}") for name in known if name.endswith(f"/{CHECKSUMS}")}
    return [name for name in known if name.partition("/")[0] in {*roles, RESULT, TRAINING_STATE}]


def consume(models: Mapping[str, ModelContent], window: WindowState | None) -> None:
    """Iterate over the rest of all states, which contain collectives."""
    for model in models.values():
        deque(model.state, maxlen=0)
    if window is not None:
        deque(window.tensors, maxlen=0)


def write_stage_folder(
    folder: Path,
    models: Mapping[str, ModelContent],
    *,
    extra: Extra,
    window: WindowState | None = None,
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
            fill_model_folder(temporary, first._replace(extra={**first.extra, **extra}))
            for role, model in others:
                write_model_folder(temporary / role, model)
            if window is not None:
                window.write(temporary)
    finally:
        consume(models, window)


def result_text(result: StageResult, length: Length) -> str:
    """Return the content of result.json: the result of a stage of a length."""
    return files.json_text(asdict(result) | {"folder": None, "length": length}, indent=2)


def read_result(
    folder: Path, length: Length | None = None, *, may_grow: bool = False
) -> StageResult | None:
    """Return a finished stage's result; None if the stage has steps to take; a collective.

    Raises:
        CheckpointError: the folder is damaged, or its stage has another length, see `is_longer`.
    """
    # Only rank 0 reads: on a network disk, other ranks may not see the files yet.
    stored = on_main(lambda: _stored_result(folder))
    if stored is None:
        return None
    result, before = stored
    if not is_longer(before, length or {}, may_grow=may_grow, where=folder):
        return result
    logger.info(
        "%s: finished with %d steps and continues (%s); from there the learning rate follows the "
        "schedule of the longer run",
        *(result.name, result.steps, differences(before, length or {})),
    )
    return None


def _stored_result(folder: Path) -> tuple[StageResult, Length] | None:
    if not folder.exists():
        return None
    path, remedy = folder / RESULT, remake(folder)
    verified_entries(folder, remedy=remedy)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        length, metrics = dict(record.pop("length")), numbers(record.pop("metrics"))
        scores = {view: numbers(values) for view, values in record.pop("scores").items()}
        record["folder"] = folder
        return StageResult(**record, metrics=metrics, scores=scores), length
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a result of this version ({error}); {remedy}"
        ) from error


def stage_once(folder: Path, make: Callable[[Path], None]) -> StageResult:
    """Return the result of an untrained stage; make its folder if missing; a collective.

    `make` writes the folder.
    """
    result = read_result(folder)
    if result is None:
        make(folder)
        result = read_result(folder)
    if result is None:
        raise CheckpointError(f"{folder} was removed while megakd wrote it; start the run again")
    return result


def cached_metrics(folder: Path, measure: Callable[[], Mapping[str, float]]) -> StageResult:
    """Return the result of a measurement, see `stage_once`; `measure` returns the metrics."""

    def make(folder: Path) -> None:
        began = time.perf_counter()
        result = StageResult(name=folder.name, folder=folder, metrics=measure())
        result = replace(result, seconds=time.perf_counter() - began)
        on_main(lambda: write_finished(folder, {RESULT: result_text(result, {})}))

    return stage_once(folder, make)


def remake(folder: Path) -> str:
    """Return instructions for making a damaged stage folder again."""
    report = folder.parent.parent / "report.json"
    also = f" and {report}" if report.is_file() else ""
    return (
        f"remove {folder}{also} and start the same command again: the stage runs again, from its "
        "last checkpoint if there is one"
    )


def length_of(train: TrainConfig) -> Length:
    """Return the keys of `train` that say how long a stage is."""
    return {key: getattr(train, key) for key in LENGTHS}


def is_longer(before: Length, now: Length, *, may_grow: bool, where: Path) -> bool:
    """Return whether a stage has more steps now than when the files of `where` were written.

    Raises:
        CheckpointError: it has another length, and is not a longer stage that `may_grow`.
    """
    changed = [(before.get(key), value) for key, value in now.items() if before.get(key) != value]
    if changed and not (may_grow and all(old and new and old < new for old, new in changed)):
        raise CheckpointError(
            f"{where} is of a stage of another length ({differences(before, now)}); use another "
            "output_dir, or that length again; only the student and the baselines may get longer"
        )
    return bool(changed)


def may_grow(stage: Stage, config: RunConfig) -> bool:
    """Return true for a stage that a longer run continues.

    If a teacher or an assistant continued to learn, its students would belong to an older teacher.
    Windows end at steps that depend on the length.
    """
    is_last = stage.name in (STUDENT, *config.trained_baselines)
    return is_last and stage.window is None


class WindowState(NamedTuple):
    """State that the next window needs in addition to the model, cut like the model.

    The tensors are the weights, the optimizer's moments and the student's `averages`.

    tensors: keys `<kind>/<weight>` and whole tensors; every rank must iterate to the end.
    rest: the remaining values, as the content of a file.
    """

    tensors: Iterator[tuple[str, Tensor]]
    rest: bytes

    @staticmethod
    def from_stage(
        student: StudentEngine,
        batches: BatchSource,
        *,
        axes: Mapping[str, Axes],
        cut: Cut | None,
    ) -> WindowState:
        """Return the state of a stage, cut like its model if `cut` is given; a collective."""
        rest = {
            "steps": student.optimizer_state.steps,
            "batches": batches.state_dict(),
            "random": gather(random_state()),
        }
        file = io.BytesIO()
        torch.save(rest, file)
        return WindowState(_whole(student, axes, cut), file.getvalue())

    def write(self, folder: Path) -> None:
        (folder / TRAINING_STATE).mkdir()
        write_weights(folder / TRAINING_STATE, self.tensors)
        files.write_content(folder / TRAINING_STATE / REST, self.rest)


def _whole(
    student: StudentEngine, axes: Mapping[str, Axes], cut: Cut | None
) -> Iterator[tuple[str, Tensor]]:
    def named() -> Iterator[tuple[str, str, Tensor]]:
        values, averages = student.optimizer_state, student.averages
        yield from values.whole()
        # A rank may hold no part of some weights, or of any.
        for name in sorted({name for names in gather([*averages]) for name in names}):
            part = averages.get(name, torch.empty(0))
            yield AVERAGES, LEARNER + name, values.put_together(LEARNER + name, part)

    for kind, name, tensor in named():
        key, of_weight = f"{kind}/{name}", axes.get(name)
        if cut is None or of_weight is None:
            yield key, tensor
        else:
            yield from cut_state([(key, tensor)], {key: of_weight}, cut.view, cut.order)


def continue_window(
    folder: Path, student: StudentEngine, batches: BatchSource, ranks: Ranks
) -> None:
    """Load the state that the previous window of a run wrote into `folder`; a collective.

    The random numbers continue if the number of ranks is the same, else the stage's seed counts.
    """
    if not on_main((folder / TRAINING_STATE / REST).is_file):
        raise CheckpointError(
            f"{folder} has no {TRAINING_STATE}/, with which the next window of the run continues; "
            f"remove {folder} to train its stage again"
        )
    where = f"{folder.name}/{TRAINING_STATE}"
    on_main(lambda: check_given(folder, where, wanted=lambda name: name.startswith(TRAINING_STATE)))
    stored, reader = check_weight_files(folder / TRAINING_STATE, where), WeightReader(where)
    rest = torch.load(folder / TRAINING_STATE / REST, weights_only=True)
    values = student.optimizer_state

    def read(kind: str, name: str, wanted: slice) -> Tensor:
        return reader.read(stored[f"{kind}/{name}"]).flatten()[wanted]

    values.load(read, steps=rest["steps"])
    for key in sorted(stored):
        kind, _, name = key.partition("/")
        if kind == AVERAGES:
            part = read(kind, name, values.part_of(name)).clone()
            student.averages[name.removeprefix(LEARNER)] = part.to(ranks.device)
    batches.load_state_dict(rest["batches"])
    if len(rest["random"]) == ranks.world_size:
        set_random_state(rest["random"][ranks.rank])
