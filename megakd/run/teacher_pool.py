"""The frozen teachers of a run: open while stages ask them, and measured once for the report.

The first stage that loads a teacher measures it before the student is built, when nothing else
takes memory. A teacher that no stage loads, such as one whose answers are cached, is loaded for
the report.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor

import megakd_kernels
from megakd.config.task import AUTO, LANGUAGE_TASKS, SOFT_LABELS
from megakd.data.batch import has_label
from megakd.engine.collectives import activity, all_reduce_
from megakd.engine.memory import forget_models, left_out_of_peak, reset_peak_memory
from megakd.errors import TeacherError
from megakd.losses.objective import logits_of
from megakd.models.fitting import ReadyTeacher
from megakd.models.structure import parameter_counts
from megakd.process.clock import phase
from megakd.reports.samples import held_out_prompts
from megakd.teachers.cached import CachedTeacher
from megakd.teachers.frozen import FrozenTeacher
from megakd.teachers.soft_labels import SoftLabels
from megakd.training.assembly import Assembly
from megakd.training.evaluation import scorer_for, scorer_of_model
from megakd.training.learners import losses_for
from megakd.training.precision import joins_micro_batches
from megakd.training.record import Row

if TYPE_CHECKING:
    from megakd.reports.samples import SamplePrompts
    from megakd.stage import Stage
    from megakd.training.evaluation import Scorer
    from megakd.training.served_teachers import ServedTeacher

    Opened = FrozenTeacher | CachedTeacher | ServedTeacher | SoftLabels

logger = logging.getLogger(__name__)

POSITIONS = 256
"""Most rows of a classifier, or targets of a language model, on each rank."""


@torch.no_grad()
def log_probabilities(scorer: Scorer, rows: Dataset, teacher: FrozenTeacher) -> Tensor:
    """Return [N, C] of this rank's first held-out rows, on the CPU; a collective at ZeRO 3."""
    first = rows.select(range(min(len(rows), scorer.batch_size * scorer.ranks.world_size)))
    (batch,) = scorer.batches(first)
    answer = teacher(batch)
    if answer.hidden is None or answer.head is None:
        return logits_of(answer)[:POSITIONS].log_softmax(-1).cpu()
    with answer.head.open():
        # Padding and prompts count for no loss.
        counted = has_label(batch.target_labels.flatten())
        few = answer._replace(hidden=answer.hidden.flatten(0, -2)[counted][:POSITIONS])
        return logits_of(few).log_softmax(-1).cpu()


def log_divergence(key: str, exact: Tensor, packed: Tensor) -> None:
    """Log the mean KL divergence of 8-bit answers from those in bf16; a collective.

    key: of the teacher in the config.

    Raises:
        TeacherError: it is no number.
    """
    out = megakd_kernels.kd_loss_from_logits(packed, exact, t_squared=True)
    sums = torch.stack([out.loss.double(), out.agreement.double(), out.n_valid.double()])
    divergence, same, count = all_reduce_(sums).tolist()
    if not divergence < float("inf"):
        raise TeacherError(
            f"{key}.dtype: fp8: the answers to {count:.0f} held-out rows or tokens are not finite "
            "numbers; use bf16"
        )
    logger.info(
        "%s in fp8: KL divergence from bf16 %.4f nats, same most likely answer %.1f %%, on %d "
        "held-out rows or tokens",
        *(key, divergence / max(1.0, count), 100 * same / max(1.0, count), count),
    )


class Measured(NamedTuple):
    """Entry of the report on a model: its size and metrics, also those on the named sets.

    answers: answers to the prompts; None without prompts, or with another tokenizer.
    predicted, losses: see `Scored`.
    """

    report: Row
    sets: Mapping[str, Mapping[str, float]]
    answers: list[str] | None
    predicted: list[int]
    losses: list[float]


class TeacherPool:
    """The frozen teachers of a run: their engines, and what the report says of them."""

    def __init__(self, assembly: Assembly) -> None:
        self.assembly, self._config = assembly, assembly.config
        self._open: dict[str, tuple[ReadyTeacher, Opened]] = {}
        self._known: dict[str, Measured] = {}
        self._compared: set[Path | None] = set()

    @contextmanager
    def of_stage(self, stage: Stage) -> Iterator[dict[str, Opened]]:
        """Open the teachers of a stage; they stay open for the next stage unless this one fails."""
        # The student without its adapters answers in the student's engine.
        names = [name for name in stage.teachers if name not in self._config.base_teachers]
        self.close(but=names)
        # The engine of the last stage must not count.
        forget_models()
        reset_peak_memory(self.assembly.ranks.device)
        try:
            yield {name: self._asked(name, stage) for name in names}
        except BaseException:
            self.close()
            raise

    def close(self, but: Collection[str] = ()) -> None:
        """Close all teachers but some whose models are still the same.

        A teacher whose answers are cached or served is always closed; to open it costs nothing.
        """
        for name, (ready, teacher) in list(self._open.items()):
            is_same = name in but and self.assembly.teachers[name] is ready
            if not (isinstance(teacher, FrozenTeacher) and is_same):
                del self._open[name]
                teacher.destroy()

    def _asked(self, name: str, stage: Stage) -> Opened:
        if name in self._open:
            _, teacher = self._open[name]
            self._ask(teacher, name, stage)
            return teacher
        is_alone, teacher = not self._open, self.open(name, stage)
        if name in self.assembly.teachers:
            self._open[name] = self.assembly.teachers[name], teacher
        if is_alone:  # another teacher would be measured beside this one
            self._measure_opened(name, teacher)
        return teacher

    def open(self, name: str, stage: Stage) -> Opened:
        """Return a teacher that gives the outputs that the losses of a stage read; a collective."""
        if name == SOFT_LABELS:
            return SoftLabels(self.assembly.prepared.splits.train, self.assembly.ranks.device)
        ready = self.assembly.teachers[name]
        losses_for(self.assembly, stage).check_outputs(self._config.key_of(name), ready)
        if ready.spec.server is not None:
            from megakd.training.served_teachers import served_teacher

            return served_teacher(self.assembly.prepared, name, self.assembly.ranks)
        cached = None
        if ready.spec.cache is not None:
            from megakd.training.served_teachers import fill_cache, open_cache

            folder = self.cache_folder(name)
            if ready.spec.cache == AUTO:
                fill_cache(self.assembly, ready, folder)
            cached = open_cache(self.assembly, ready, folder)
            if not ready.is_loaded(measures_losses=bool(stage.measured)):
                return cached
        teacher = self._load(name)
        self._ask(teacher, name, stage)
        if cached is None:
            return teacher
        cached.model = teacher
        return cached

    def _load(self, name: str) -> FrozenTeacher:
        """Load a teacher; what 8 bits change of its answers is compared once, with it in bf16."""
        ready, assembly = self.assembly.teachers[name], self.assembly.for_role(name)
        source, exact, rows = ready.source, None, assembly.prepared.encoded.validation
        # Others have no distribution for a row or token.
        is_one = self._config.task.type != "regression" and not assembly.prepared.splits.multi_label
        if source.fp8 and is_one and source.folder not in self._compared:
            self._compared.add(source.folder)
            with assembly.loaded(ready._replace(source=replace(source, fp8=False))) as model:
                exact = log_probabilities(scorer_for(assembly), rows, model)
        teacher = assembly.frozen(ready)
        if exact is not None:
            packed = log_probabilities(scorer_for(assembly), rows, teacher)
            log_divergence(self._config.key_of(name), exact, packed)
        return teacher

    def cache_folder(self, name: str) -> Path:
        """Return the folder of a teacher's cached answers."""
        cache = self.assembly.teachers[name].spec.cache
        if cache is None:
            raise TypeError(f"{name} has no cache")
        return self.assembly.stage_folder(f"{name}-answers") if cache == AUTO else cache

    def _ask(self, teacher: Opened, name: str, stage: Stage) -> None:
        if not isinstance(teacher, FrozenTeacher):
            return
        ready = self.assembly.teachers[name]
        needs = losses_for(self.assembly, stage).teacher_needs()
        joins = joins_micro_batches(
            ready,
            needs,
            stage.train,
            self._config,
            dtype=self.assembly.teacher_dtype(ready),
            device=self.assembly.ranks.device.type,
        )
        teacher.ask_for(needs, joins=joins)

    def _measure_opened(self, name: str, teacher: Opened) -> None:
        if name not in self._config.teacher_specs or not isinstance(teacher, FrozenTeacher):
            return
        if name not in self._known:
            with left_out_of_peak(self.assembly.ranks.device):
                self._measure(name, teacher)
                forget_models()

    @contextmanager
    def loaded(self, name: str) -> Iterator[FrozenTeacher]:
        """Load a teacher alone, and measure it unless it is measured; a collective."""
        self.close()
        model = self._load(name)
        try:
            if name not in self._known:
                self._measure(name, model)
            yield model
        finally:
            model.destroy()

    def score(self, name: str) -> Mapping[str, float]:
        assembly = self.assembly.for_role(name)
        with self.loaded(name) as model:
            return scorer_for(assembly).score(model.predict, assembly.prepared.encoded.validation)

    def measured(self, name: str) -> Measured:
        """Return what the report says of a teacher; load it if no stage has; a collective."""
        if name not in self._known:
            with self.loaded(name):
                pass
        return self._known[name]

    @property
    def folders(self) -> dict[str, Path | None]:
        """The folders of the configured teachers that a method asked for, without served ones."""
        ready, specs = self.assembly.teachers, self._config.teacher_specs.items()
        names = [name for name, spec in specs if name in ready and spec.server is None]
        return {name: ready[name].source.folder for name in names}

    @cached_property
    def prompts(self) -> SamplePrompts | None:
        """The prompts of the report; None if the task has no prompts."""
        if self._config.task.type not in LANGUAGE_TASKS:
            return None
        prepared, device = self.assembly.prepared, self.assembly.ranks.device
        rows = prepared.encoded.held_out
        return held_out_prompts(rows, prepared.tokenizer, self._config.task, device)

    def _measure(self, name: str, model: FrozenTeacher) -> None:
        assembly, shared = self.assembly.for_role(name), self.assembly.prepared
        prompts = self.prompts if shared.tokenizer_of(name) is shared.tokenizer else None
        with phase("scoring"), activity(f"scoring {name}"):
            self._known[name] = measure(assembly, model, prompts)


def measure(assembly: Assembly, model: FrozenTeacher, prompts: SamplePrompts | None) -> Measured:
    """Return what the report says of a loaded model; a collective."""
    scorer = scorer_of_model(assembly, model)
    scored = scorer.scored(model.predict, assembly.prepared.encoded.held_out)
    counts = parameter_counts(model.model)
    report: Row = {
        "parameters": counts.parameters,
        "encoder_parameters": counts.encoder_parameters,
        "metrics": scored.metrics,
        **scored.of_classes,
    }
    answers = None if prompts is None else prompts.answers(model)
    sets = set_metrics(assembly, scorer, model)
    return Measured(report, sets, answers, scored.predicted, scored.losses)


def set_metrics(
    assembly: Assembly, scorer: Scorer, loaded: FrozenTeacher
) -> dict[str, dict[str, float]]:
    """Return the metrics of a loaded model by set, with its own scorer; a collective."""
    sets = assembly.prepared.encoded.evaluation_sets
    return {name: scorer.score(loaded.predict, rows) for name, rows in sets.items()}
