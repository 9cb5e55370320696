"""The scores of a model on the held-out rows of a run, or on given rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from megakd.commands.arguments import scored_model
from megakd.config.run import RunConfig
from megakd.config.task import LANGUAGE_TASKS, STUDENT, TaskConfig, listed_files
from megakd.data.files import scored_table
from megakd.data.labels import Classes
from megakd.data.rows import VALIDATION_FRACTION, RowKind, default_metrics, scored_rows
from megakd.data.splits import Splits
from megakd.data.tokenizers import from_folder, has_tokenizer_files, load_tokenizer
from megakd.engine.collectives import main_first
from megakd.errors import DataError, MegakdError, TeacherError
from megakd.models.fitting import MULTI_LABEL, ModelSource, model_label_names
from megakd.models.loading import resolve_model
from megakd.models.onnx import MODEL, quantize_graph
from megakd.models.packing import packing_at
from megakd.models.thresholds import deciding_threshold
from megakd.reports.report_file import standard_errors
from megakd.run.main import started
from megakd.run.run_report import graph_scores, row_count
from megakd.run.teacher_pool import set_metrics
from megakd.training.assembly import Assembly
from megakd.training.evaluation import scorer_of_model
from megakd.training.inputs import (
    RunInputs,
    cache_folder,
    encoded_rows,
    prepare,
    splits_of,
    with_data,
)
from megakd.training.metrics import task_metrics
from megakd.training.tokenizer_checks import check_vocabularies, without_tokenizer

logger = logging.getLogger(__name__)


def evaluate_model(
    config: RunConfig, model: str | None, *, data: str | None = None
) -> dict[str, Any]:
    """Score a model folder, by default the run's `final/`.

    Args:
        config: the config of the run; with `data`, only `task` and `student.deepspeed` are used.
        model: a model folder; None takes the run's `final/`.
        data: a file, pattern or folder to score instead of the run's held-out rows.

    Returns:
        `model`, `file`, `split`, `rows`, `metrics`, and `evaluation_sets`: by name `file`, `rows`
        and `metrics`. `standard_errors` of all have the keys of report.json.
    """
    folder = scored_model(config.output_dir, model)
    if data == "":
        raise DataError('--data "": names no file; give a file, a pattern or a folder')
    # Users can add the student's permissions to the command.
    where, trusted = "student.model (--model)", config.student.trust_remote_code
    with started(config) as ranks:
        source = main_first(
            lambda: resolve_model(str(folder), config.task, where=where, trust_remote_code=trusted)
        )
        if data is None:
            prepared, split = _held_out(config, source)
        else:
            splits, split = _rows_of(config, source, data)
            prepared = _read_by(source, config, splits)
        assembly = Assembly(prepared=prepared, ranks=ranks)
        with assembly.scored(source) as loaded:
            scorer = scorer_of_model(assembly, loaded)
            metrics = scorer.score(loaded.predict, prepared.encoded.held_out)
            of_sets = set_metrics(assembly, scorer, loaded)
    files, splits = config.task.evaluation_sets, prepared.splits

    def scored(file: str, rows: Dataset, scores: Mapping[str, float]) -> dict[str, object]:
        count, is_language = row_count(rows), config.task.type in LANGUAGE_TASKS
        errors = {} if is_language else standard_errors(scores, count)
        return {"file": file, "rows": count, "metrics": dict(scores), "standard_errors": errors}

    return {
        "model": str(folder),
        "split": split,
        **scored(config.task.data_name if data is None else data, splits.held_out, metrics),
        "evaluation_sets": {
            name: scored(", ".join(listed_files(files[name])), splits.evaluation_sets[name], of_set)
            for name, of_set in of_sets.items()
        },
    }


def _held_out(config: RunConfig, source: ModelSource) -> tuple[RunInputs, str]:
    """Return the inputs of the run as the model reads them, and the split that is scored."""
    is_decoder = config.task.type == "causal_lm"
    if is_decoder and packing_at(source.where, source.config, None) == "apart":
        # The models of the run may be of another family.
        config = replace(config, train=replace(config.train, packing=False))
    prepared, folder = prepare(config), source.folder
    if prepared.pair is not None and folder is not None and has_tokenizer_files(folder):
        vocabulary = from_folder(folder).get_vocab()
        if vocabulary == prepared.pair.teacher.get_vocab():
            prepared = prepared.for_role(next(role for role in prepared.sources if role != STUDENT))
    # The rows are in tokens of the run: a model with others is refused.
    check_vocabularies(_models_task(config), prepared.tokenizer, [source])
    split = "validation" if prepared.splits.test is None else "test"
    if prepared.splits.test is None and prepared.splits.is_cut:
        split += f" ({VALIDATION_FRACTION:.0%} of the training rows, selected by hash)"
    return prepared, split


def _rows_of(config: RunConfig, source: ModelSource, data: str) -> tuple[Splits, str]:
    """Return the rows of a file, pattern or folder, and the name of their split; a collective."""
    task, problem = config.task, source.config.problem_type
    if task.type == "classification" and problem is not None:  # else the data decide
        task = replace(task, multi_label=problem == MULTI_LABEL)

    def load() -> tuple[Splits, str]:
        table, split = scored_table(data, task)
        classes = None
        if task.type == "classification":  # matched as the model's labels are
            names = model_label_names(source.config)
            classes = Classes(names, numbered=True, folds_case=True)
        as_chat = task.mixture is not None  # whose documents are not packed
        of_model = replace(task, labels=classes.names) if classes else task
        kind = RowKind.from_task(of_model, table, as_chat=as_chat)
        rows = scored_rows(table, kind, task, classes, cache_dir=cache_folder())
        names = classes.names if classes else ()
        metrics = default_metrics(task.type, rows)
        return Splits(rows, rows, None, names, metrics, table.digest, kind), split

    return main_first(load)


def _models_task(config: RunConfig) -> TaskConfig:
    """Return the task without a tokenizer if a model has a vocabulary of its own."""
    task = config.task
    return task if config.method.own_vocabulary is None else replace(task, tokenizer=None)


def _read_by(source: ModelSource, config: RunConfig, splits: Splits) -> RunInputs:
    """Return the held-out rows, encoded for a model; a collective.

    The tokenizer is the one that `task.tokenizer` names, else the model's.
    """
    task = _models_task(config)
    if not isinstance(task.tokenizer, str):
        task = replace(task, tokenizer=None)  # a tokenizer recipe is for the run's text
    if problems := list(without_tokenizer(task, [source])):
        raise TeacherError("\n".join(problems))
    folders = [source.folder] if source.folder else []
    tokenizer = main_first(
        lambda: load_tokenizer(task, splits, model_folders=folders, cache_dir=cache_folder())
    )
    check_vocabularies(task, tokenizer, [source])
    config = with_data(replace(config, task=task), splits, tokenizer, {STUDENT: source})
    names, is_set = splits.label_names, splits.multi_label
    metrics = task_metrics(config.eval, task.type, splits.metrics, names, multi_label=is_set)
    if is_set:  # these rows choose none
        metrics = replace(metrics, threshold=deciding_threshold(source.config))
    return RunInputs(
        config=config,
        splits=splits,
        metrics=metrics,
        tokenizer=tokenizer,
        sources={},
        encoded=encoded_rows(config, splits, tokenizer, with_train=False),
    )


def int8_graph(config: RunConfig, folder: Path, whole: Path) -> list[str]:
    """Write the graph `whole` of a model folder as an int8 one; return lines with its scores.

    It is scored on the run's held-out rows, or not at all, which a warning says.
    """
    with started(config) as ranks:
        scores = None
        try:
            source = resolve_model(str(folder), config.task, where="--to")
            prepared = _read_by(source, config, splits_of(config))
            assembly = Assembly(prepared=prepared, ranks=ranks)
            scores = partial(graph_scores, assembly, prepared.metrics.threshold)
        except MegakdError as error:
            logger.warning("the int8 graph is not scored: %s", error)
        return quantize_graph(whole, folder / MODEL, scores)
