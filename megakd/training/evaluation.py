"""Scores and losses of a model on held-out rows, computed by all ranks together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from datasets import Dataset

from megakd.config.sections import TrainConfig
from megakd.config.task import TaskType
from megakd.data.batch import Batch, Pass, Predictions, count_units, has_label
from megakd.data.collation import Collator, Masking, task_masking
from megakd.data.loader import evaluation_batches
from megakd.engine.collectives import all_reduce_, gather, on_main, progress
from megakd.engine.distributed import Ranks
from megakd.errors import CheckpointError
from megakd.losses.bundle import StudentBundle
from megakd.models.thresholds import stored_threshold, threshold_in
from megakd.stage import WHOLE
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.assembly import Assembly
from megakd.training.checkpoint import Checkpoints
from megakd.training.metrics import TaskMetrics, language_model_metrics, summed_loss
from megakd.training.record import Row
from megakd.training.student import StudentEngine, device_batch
from megakd.training.trainer import Trainer

Predict = Callable[[Batch], Predictions]

PredictViews = Callable[[Batch], Mapping[str, Predictions]]

Ask = Callable[[Batch], Mapping[str, torch.Tensor]]


FEW: dict[TaskType, int] = {"classification": 256, "regression": 256, "mlm": 32, "causal_lm": 32}
"""Rows for a loss that is measured many times: a text has many labels, or one.

The two layers of MiniLM whose absence costs most were found with 32 labels in 72 % of draws, and in
all with 256.
"""


def few(rows: Dataset, task: TaskType, *, times: int = 1) -> Dataset:
    """Return at most `times` as many rows as in `FEW`, at equal distances."""
    count = min(times * FEW[task], len(rows))
    return rows.select([number * len(rows) // count for number in range(count)])


class Scored(NamedTuple):
    """The metrics of a model; for a classifier, also its scores by class.

    predicted: what a classifier predicts for each row, see `TaskMetrics.answers`, in order.
    losses: of a language model, the mean cross-entropy of each batch, in the same order for all
        models.
    """

    metrics: dict[str, float]
    of_classes: Row
    predicted: list[int]
    losses: list[float]


class Seen(NamedTuple):
    """Predictions so far: sums, see `language_model_metrics`, or the outputs of all rows.

    batches: of each micro-batch, the summed loss and the number of targets.
    """

    sums: torch.Tensor
    batches: list[torch.Tensor]
    outputs: list[torch.Tensor]
    labels: list[torch.Tensor]

    def gathered(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs and the labels of all `count` rows; a collective."""
        both = (gather(torch.stack(one)) for one in (self.outputs, self.labels))
        outputs, labels = (_in_order(of_ranks, count) for of_ranks in both)
        return outputs, labels


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scorer that computes the task's metrics from a split and a forward.

    batch_size: rows per rank.
    masking: hides tokens of every row, the same tokens at every evaluation (mlm).
    characters: [V] number of characters of every token, for mlm, see `characters_of_tokens`.
    """

    metrics: TaskMetrics
    collate: Collator
    batch_size: int
    ranks: Ranks
    masking: Masking | None = None
    characters: torch.Tensor | None = None

    def score(self, predict: Predict, rows: Dataset) -> dict[str, float]:
        """Return the metrics of `predict` on `rows`, the same on every rank."""
        return self.scores(lambda batch: {WHOLE: predict(batch)}, rows)[WHOLE]

    def scores(self, predict: PredictViews, rows: Dataset) -> dict[str, dict[str, float]]:
        """Return the metrics of `predict` on `rows` by view, the same on every rank."""
        views = self._seen(predict, rows)
        return {name: self._metrics(seen, len(rows)) for name, seen in views.items()}

    def scored(self, predict: Predict, rows: Dataset) -> Scored:
        """Return what the report says of `predict` on `rows`, the same on every rank."""
        seen, metrics = self._seen(lambda batch: {WHOLE: predict(batch)}, rows)[WHOLE], self.metrics
        if not seen.outputs:
            batches = torch.stack([*gather(torch.stack(seen.batches))], dim=1).flatten(0, 1)
            sums, targets = batches.unbind(1)
            losses = (sums / targets)[targets > 0].tolist()  # dummy rows have no targets
            return Scored(self._metrics(seen, len(rows)), {}, [], losses)
        outputs, labels = seen.gathered(len(rows))

        def measure() -> Scored:
            of_classes = metrics.of_classes(outputs, labels)
            classes = metrics.answers(outputs, labels) if of_classes else []
            return Scored(metrics.values(outputs, labels), of_classes, classes, [])

        return on_main(measure)

    def _seen(self, predict: PredictViews, rows: Dataset) -> dict[str, Seen]:
        # Every rank has at least one batch, so all ranks see the same kind of predictions.
        views: dict[str, Seen] = {}
        for batch in self.batches(rows):
            characters = 0
            if self.characters is not None:
                labels = batch.labels.cpu()
                characters = int(self.characters[labels[has_label(labels)]].sum())
            for name, predictions in predict(batch).items():
                seen = views.setdefault(name, Seen(torch.zeros(4, dtype=torch.float64), [], [], []))
                if predictions.sums is not None:
                    sums = predictions.sums.cpu()
                    seen.sums[:3] += sums
                    seen.sums[3] += characters
                    seen.batches.append(sums[[0, 2]])
                if predictions.outputs is not None:
                    seen.outputs.append(predictions.outputs.cpu())
                    seen.labels.append(batch.labels.cpu())
        return views

    def _metrics(self, seen: Seen, count: int) -> dict[str, float]:
        if seen.outputs:
            outputs, labels = seen.gathered(count)
            return on_main(lambda: self.metrics.values(outputs, labels))
        all_reduce_(seen.sums)
        known = seen.sums if self.characters is not None else seen.sums[:3]
        return on_main(lambda: language_model_metrics(known))

    def loss(self, predict: Predict, rows: Dataset) -> float:
        """Return the mean cross-entropy in nats or the mean squared error, the same on every rank.

        The mean is over the targets of a language model, or over the labelled rows of other tasks.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self.batches(rows):
            answer = predict(batch)
            if answer.sums is not None:
                sums += answer.sums[[0, 2]].cpu()
            if answer.outputs is not None:
                sums += summed_loss(answer.outputs.cpu(), batch.labels.cpu())
        total, count = all_reduce_(sums).tolist()
        return total / max(1.0, count)

    def answers(self, ask: Ask, rows: Dataset, *, first: int = 0) -> dict[str, torch.Tensor]:
        """Return a model's answers for every row, the same on every rank.

        Args:
            ask: returns tensors of one shape, by name, for every micro-batch, whose rows are
                numbered; rows come first.
            first: the number of the first row.
        """
        given: list[Mapping[str, torch.Tensor]] = []
        for turn, batch in enumerate(self.batches(rows)):
            size = len(batch.valid)
            numbers = (turn * self.ranks.world_size + self.ranks.rank) * size + torch.arange(size)
            numbers = torch.where(numbers < len(rows), first + numbers, -1)
            given.append(ask(batch._replace(rows=numbers)))
        return {
            name: _in_order(gather(torch.stack([one[name].cpu() for one in given])), len(rows))
            for name in given[0]
        }

    def batches(self, rows: Dataset) -> Iterator[Batch]:
        """Yield this rank's share of the rows on its device, equally many batches on each rank."""
        ranks = self.ranks
        dealt = evaluation_batches(
            rows,
            self.collate,
            batch_size=self.batch_size,
            rank=ranks.rank,
            world=ranks.world_size,
            masking=self.masking,
        )
        for batch in progress(dealt, total=len(rows), each=self.batch_size * ranks.world_size):
            yield device_batch(batch, ranks.device)


def _in_order(of_ranks: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    # Of the answers of each rank [turns, rows, …]; the dummy rows, which fill the last batches that
    # were dealt, come last.
    return torch.stack([*of_ranks], dim=1).flatten(0, 2)[:count]


class HeldOutLosses:
    """Means of the loss terms; a micro-batch asks each teacher once and runs the student once."""

    def __init__(self, trainer: Trainer, bundle: StudentBundle, plan: Sequence[Pass]) -> None:
        self._trainer, self._bundle, self._plan = trainer, bundle, plan
        # The sum and the count of each term.
        self._sums = torch.zeros(2, len(bundle.objective.units), dtype=torch.float64)

    def add(self, batch: Batch) -> Predictions:
        """Measure a micro-batch, of which every rank has equally many; return its predictions."""
        answers = self._trainer.ask_teachers(self._plan, batch)
        measured = self._trainer.student.measure(batch, answers, self._plan)
        counts = count_units([batch], self._bundle.counters)
        for place, (term, unit) in enumerate(self._bundle.objective.units.items()):
            if term in measured.parts:
                self._sums[0, place] += measured.parts[term].double().cpu()
                self._sums[1, place] += counts[unit].cpu()
        return cast("Predictions", measured.predictions)

    def means(self) -> dict[str, float]:
        """Return the mean of every term over its own unit; a collective.

        A term is left out if no pass measures it, or if the rows have none of its unit.
        """
        sums, counts = all_reduce_(self._sums).tolist()
        units = self._bundle.objective.units
        return {t: s / count for t, s, count in zip(units, sums, counts, strict=True) if count}


@dataclass(frozen=True)
class StageProbe:
    """The loss on held-out rows, and the initial student; every method is a collective.

    beginning: stores the initial state of the student, as step 0.
    """

    scorer: Scorer
    rows: Dataset
    beginning: Checkpoints

    def loss(self, student: StudentEngine) -> float:
        return self.scorer.loss(student.predict, self.rows)

    def remember(self, student: StudentEngine) -> None:
        on_main(lambda: shutil.rmtree(self.beginning.folder, ignore_errors=True))
        self.beginning.save(0, student.files(), {}, is_last=True)

    def reset(self, student: StudentEngine) -> None:
        student.load(self.beginning.folder / "step-0")

    def check_remembered(self) -> None:
        folder = self.beginning.folder
        if (reason := self.beginning.damage(folder / "step-0")) is not None:
            raise CheckpointError(
                f"{folder} is damaged: {reason}, and the next episodes start from this student; "
                f"remove {folder.parent} to train the stage again"
            )


def scorer_for(assembly: Assembly, train: TrainConfig | None = None) -> Scorer:
    """Return a scorer on held-out rows; `train`: the settings of the evaluated stage."""
    inputs, config = assembly.prepared, assembly.config
    return Scorer(
        metrics=inputs.metrics,
        collate=Collator(inputs.tokenizer, config.task),
        batch_size=config.eval_rows(train),
        ranks=assembly.ranks,
        masking=task_masking(inputs.tokenizer, config.task),
        characters=inputs.characters,
    )


def scorer_of_model(assembly: Assembly, model: FrozenTeacher) -> Scorer:
    """Return a scorer with the threshold of a model whose rows have any number of labels.

    It is that of the model's config, or the best on the validation rows; a collective.
    """
    scorer, splits = scorer_for(assembly), assembly.prepared.splits
    if not splits.multi_label or scorer.metrics.threshold is not None:
        return scorer
    threshold = stored_threshold(model.model.config, splits.label_names)
    if threshold is None and splits.test is not None:
        values = scorer.score(model.predict, assembly.prepared.encoded.validation)
        threshold = threshold_in(values)
    return replace(scorer, metrics=replace(scorer.metrics, threshold=threshold))


def probe_for(assembly: Assembly, stage: str) -> StageProbe:
    """Return the probe of a stage that starts anew several times."""
    folder = assembly.config.output_dir / "checkpoints" / stage / "beginning"
    beginning = Checkpoints(folder=folder, keep=None, ranks=assembly.ranks)
    return StageProbe(scorer_for(assembly), assembly.prepared.encoded.validation, beginning)
