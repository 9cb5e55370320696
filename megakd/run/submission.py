"""Submission files for a GLUE task, from a model and the unlabelled test split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megakd.config.models import TeacherConfig
from megakd.data.encoding import encode_rows
from megakd.data.glue import TASKS, glue_name
from megakd.data.glue_submission import SubmissionRows, submission_rows
from megakd.engine.collectives import main_first, on_main
from megakd.engine.distributed import Ranks
from megakd.errors import ConfigError, TrainingError
from megakd.models.knowledge import Needs
from megakd.run.main import started
from megakd.run.scored_model import model_folder, scored_model
from megakd.run.writable import check_writable
from megakd.storage import atomic
from megakd.training.engines import Assembly, ReadyTeacher
from megakd.training.inputs import prepare
from megakd.training.label_check import check_label_order
from megakd.training.recipes import scoring_preset
from megakd.training.run_data import cache_folder
from megakd.training.vocabulary_checks import check_vocabularies

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from megakd.config.run import RunConfig

HEADER = "index\tprediction\n"
SCORES = (0.0, 5.0)
"""The range of the scores in STS-B."""


def write_submission(
    config: RunConfig, model: str | None, folder: Path, *, trusts_order: bool = False
) -> list[Path]:
    """Predict the test rows of the run's GLUE task and write them in GLUE's format.

    One file is written per test split, and its `index` counts the rows from 0. MNLI has two test
    splits, and one more file for the diagnostic set if that set is available. A file is written
    completely or not at all, and only after all files are predicted.

    Args:
        config: the config of the run; its task must be a GLUE task.
        model: a model folder; None takes the run's `final/`.
        folder: the folder of the files; files of the same names are replaced.
        trusts_order: assume that generic labels (LABEL_0, …) are in the data's order.

    Returns:
        The paths of the files.

    Raises:
        MegakdError: the task is not a GLUE task, a test file or the model does not exist, or the
            model does not fit the task, on all ranks alike.
    """
    glue = TASKS[_glue_name(config)]
    chosen = model_folder(config, model)
    check_writable(folder, where="--submission")
    answer = classes_of(glue.classes, by_name=not glue.numbered) if glue.classes else _scores
    with started(config) as ranks:
        cache = cache_folder()
        found = main_first(lambda: submission_rows(config.task, cache_dir=cache))
        outputs = _outputs(config, ranks, chosen, found, trusts_order=trusts_order)
        return on_main(lambda: _write(folder, outputs, answer))


def _glue_name(config: RunConfig) -> str:
    if not config.task.data_name.startswith("glue/"):
        raise ConfigError(
            f"task.dataset: {config.task.data_name} is not a GLUE task, and --submission writes "
            "GLUE's submission files; use the config of a run on glue/<task>, such as glue/mrpc"
        )
    return glue_name(config.task.data_name)


def _outputs(
    config: RunConfig, ranks: Ranks, chosen: Path, found: SubmissionRows, *, trusts_order: bool
) -> dict[str, Tensor]:
    """Return the model's outputs for every test row, by the stem of the file; a collective."""
    prepared = prepare(config)
    assembly = Assembly(config=config, prepared=prepared, ranks=ranks)
    source = main_first(lambda: scored_model(config, chosen))
    check_vocabularies(config.task, prepared.tokenizer, [source])
    preset = scoring_preset(config.student.deepspeed)
    dtype = assembly.scoring_dtype()
    ready = ReadyTeacher(source, TeacherConfig(model=str(chosen), deepspeed=preset, dtype=dtype))
    check_label_order(
        assembly, ready, None, is_accepted=trusts_order, remedy="give --trust_label_order"
    )

    def encode() -> dict[str, Dataset]:
        rows, content, cache = found.rows, found.content_hash, cache_folder()
        encoded, _ = encode_rows(
            rows, prepared.tokenizer, config.task, content_hash=content, cache_dir=cache
        )
        return encoded

    encoded = main_first(encode)
    frozen = assembly.frozen(source, preset, dtype=dtype, needs=Needs())
    try:
        scorer = assembly.scorer()
        return {stem: scorer.outputs(frozen.predict, rows) for stem, rows in encoded.items()}
    finally:
        frozen.destroy()


def classes_of(names: tuple[str, ...], *, by_name: bool) -> Callable[[Tensor], Iterator[str]]:
    """Return a function that writes the class of the largest logit as a name or a number.

    Args:
        names: the class names in the order of the logits.
        by_name: write names, as in the task's own files.
    """

    def written(outputs: Tensor) -> Iterator[str]:
        for number in outputs.argmax(dim=1).tolist():
            yield names[number] if by_name else str(number)

    return written


def _scores(outputs: Tensor) -> Iterator[str]:
    for score in outputs[:, 0].clamp(*SCORES).tolist():
        yield f"{score:.3f}"


def _write(
    folder: Path, outputs: Mapping[str, Tensor], answer: Callable[[Tensor], Iterator[str]]
) -> list[Path]:
    for stem, said in outputs.items():
        bad = int((~said.isfinite()).any(dim=1).sum())
        if bad:
            raise TrainingError(
                f"{stem}.tsv is not written: the model's outputs are not finite for {bad} of "
                f"{len(said)} test rows; training has diverged: lower train.learning_rate"
            )
    paths = []
    for stem, said in outputs.items():
        rows = (f"{index}\t{written}\n" for index, written in enumerate(answer(said)))
        paths.append(folder / f"{stem}.tsv")
        atomic.write_text(paths[-1], HEADER + "".join(rows))
    return paths
