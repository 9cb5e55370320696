"""Teachers against the student's start on the validation rows, before any training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from megakd.config.run import RunConfig
from megakd.contract.batch import Batch, Predictions
from megakd.contract.stage import Stage, StageResult
from megakd.contract.tasks import STUDENT, TaskType
from megakd.data.chat.conversations import is_chat
from megakd.data.chat.tokens import PROMPT_LENGTH
from megakd.data.tokenizers import from_folder, has_tokenizer_files
from megakd.engine.activity import doing
from megakd.engine.distributed import Ranks
from megakd.errors import CheckpointError, ConfigError
from megakd.inputs.inputs import RunInputs, as_student, prepare
from megakd.models.knowledge import predictions_of
from megakd.models.source import ModelSource
from megakd.run.main import started
from megakd.run.run_lab import RunLab
from megakd.run.run_report import row_count
from megakd.scoring.metrics import Likeness
from megakd.storage.fingerprint import Fingerprint
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.assembly import Assembly
from megakd.training.label_check import check_label_orders
from megakd.training.progress import Reporter
from megakd.training.recipes import scoring_preset

RANKED_BY: Mapping[TaskType, str] = {"classification": "accuracy", "causal_lm": "accuracy"}
"""The metric whose order of teachers was that of their students, in tasks where this was measured;
see docs/match.md."""


class _ForgetfulAssembly(Assembly):
    """An assembly that measures anew, and leaves no folder in `stages/`."""

    def measured_once(
        self, name: str, facts: Mapping[str, Any], measure: Callable[[], Mapping[str, float]]
    ) -> StageResult:
        del facts
        return StageResult(name=name, folder=Path(), metrics=measure())


class _UntrainedLab(RunLab):
    """A lab that takes finished stages of the run, and trains nothing."""

    def __init__(self, prepared: RunInputs, ranks: Ranks) -> None:
        out = prepared.config.output_dir
        super().__init__(prepared, ranks, Reporter(out, is_main=False))
        self.assembly = _ForgetfulAssembly(prepared=prepared, ranks=ranks, teachers=self._teachers)

    def _run(self, stage: Stage, fingerprint: Fingerprint, folder: Path) -> NoReturn:
        del fingerprint
        raise CheckpointError(
            f"{self.config.key_of(stage.role)}.finetune: the teacher is not trained, because "
            f"{folder} does not exist; megakd match trains nothing: train the teacher alone and "
            "give its folder as the model, or stop the run after this stage"
        )

    @property
    def start(self) -> ModelSource:
        """The model that the student starts as; a method may cut it during the run."""
        role = self.config.start_role
        if role == STUDENT:
            return self.given(STUDENT)
        return self._start() or as_student(self.model(self.teacher(role)), self.config)


def match_models(config: RunConfig) -> dict[str, Any]:
    """Score the teachers and the student's start; a collective.

    Returns:
        `file`, `split`, `rows`, the name of the main `metric`, `start` (what it is as `model`, and
        its `metrics`), and `teachers`: by name `model`, `metrics`, `gap` (loss of the start less
        loss of the teacher), the means of `Likeness`, and whether vocabulary and chat template are
        those of the student. Models with different vocabularies have no gap and no likeness.
        `ranking`: the names of several teachers, best first, if the task is one of `RANKED_BY`.
    """
    _check(config)
    with started(config) as ranks:
        prepared = prepare(config)
        lab = _UntrainedLab(prepared, ranks)
        check_label_orders(lab.assembly)
        source, assembly = lab.start, lab.assembly
        preset = scoring_preset(config.student.deepspeed)
        dtype, rows = assembly.scoring_dtype(), prepared.encoded.validation
        with assembly.loaded(source, preset, dtype, need_head=False) as start:
            with doing("scoring the student's start"):
                metrics = assembly.scorer().score(start.predict, rows)
            teachers = {n: _teacher(lab, n, start, metrics) for n in config.teacher_specs}
    main = RANKED_BY.get(config.task.type)
    known = {n: one["metrics"][main] for n, one in teachers.items() if main in one["metrics"]}
    is_ranked = len(known) == len(teachers) > 1
    return {
        "file": config.task.data_name,
        "split": "validation",
        "rows": row_count(prepared.splits.validation),
        "metric": prepared.metric.name,
        "start": {"model": _told(source, config), "metrics": metrics},
        "teachers": teachers,
        "ranking": sorted(known, key=lambda name: -known[name]) if is_ranked else [],
    }


def _check(config: RunConfig) -> None:
    if not config.teacher_specs:
        raise ConfigError(
            "teacher: missing, and megakd match compares teachers with the student's start; add "
            "teacher or teachers"
        )
    for name, spec in config.teacher_specs.items():
        if spec.server is not None:
            raise ConfigError(
                f"{config.key_of(name)}.server: megakd match loads the teacher itself; set the key "
                "to null"
            )


def _told(source: ModelSource, config: RunConfig) -> str:
    role = config.start_role
    kept = source.layers and f"layers {', '.join(map(str, source.layers))} of "
    name = source.name if role == STUDENT else f"{config.key_of(role)} {source.name}"
    if source.folder is None:
        return f"{kept or ''}{name} with random weights"
    is_cut = config.method.cuts_student and not kept
    return f"{kept or ''}{name}" + (f", before {config.method.name} cuts it" if is_cut else "")


def _teacher(
    lab: _UntrainedLab, name: str, start: FrozenTeacher, of_start: Mapping[str, float]
) -> dict[str, Any]:
    ready, assembly = lab.assembly.teachers[lab.teacher(name)], lab.assembly.of(name)
    likeness, scorer = Likeness(), assembly.scorer()
    is_shared = assembly.prepared.tokenizer is lab.assembly.prepared.tokenizer
    preset, dtype = ready.spec.deepspeed, assembly.teacher_dtype(ready)
    with doing(f"scoring {name}"), assembly.loaded(ready.source, preset, dtype) as model:

        def compared(batch: Batch) -> Predictions:
            ours, theirs = start(batch), model(batch)
            with ExitStack() as heads:
                for head in filter(None, (ours.head, theirs.head)):
                    heads.enter_context(head.open())
                likeness.add(ours, theirs, batch)
                return predictions_of(theirs, batch)

        predict = compared if is_shared else model.predict
        metrics = scorer.score(predict, assembly.prepared.encoded.validation)
    alike = {"gap": of_start["loss"] - metrics["loss"], **likeness.means()} if is_shared else {}
    same = same_files(lab.assembly.prepared, name)
    return {"model": ready.source.name, "metrics": metrics, **alike, **same}


def same_files(prepared: RunInputs, name: str) -> dict[str, str]:
    """Return whether a teacher's vocabulary and chat template are those of the student."""
    ours, theirs = (_tokenizer(prepared, role) for role in (STUDENT, name))
    is_same = {"vocabulary": ours.get_vocab() == theirs.get_vocab()}
    rows = prepared.splits.validation
    if is_chat(rows) or PROMPT_LENGTH in rows.column_names:
        is_same["chat_template"] = ours.chat_template == theirs.chat_template
    return {what: "same" if same else "different" for what, same in is_same.items()}


def _tokenizer(prepared: RunInputs, role: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in the folder of a model, else the run's."""
    folder = prepared.sources[role].folder
    if prepared.pair is not None or folder is None or not has_tokenizer_files(folder):
        return prepared.tokenizer_of(role)
    return from_folder(folder, prepared.config.task.type)
