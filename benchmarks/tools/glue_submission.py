"""Write GLUE's submission files: a model's answers to the unlabelled test rows of a task.

`python benchmarks tools.glue_submission --config RUN.yaml --to FOLDER [--model FOLDER]
[--trust_remote_code] [key=value ...]`, in one process and with plain transformers. The run says
the task (`glue/<task>` with `task.data_dir`) and the length of the rows; the model is the run's
`final/` unless another one is given. MNLI has two test files, and a third for the diagnostic set
where `AX/AX.tsv` is there. All files are written, or none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megakd.config.file import load_config
from megakd.config.run import RunConfig
from megakd.data.glue import TASKS, GlueTask, glue_name, task_folder
from megakd.data.readers import read_tsv
from megakd.errors import MegakdError
from megakd.storage.atomic import write_text

STEMS = {"cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B"}
"""Names of files that are not those of their tasks in capitals."""
MNLI = {"MNLI-m": "test_matched", "MNLI-mm": "test_mismatched"}
ROWS = 64


class SubmissionError(MegakdError):
    """The run, the model or the test rows do not make a submission."""


def test_files(config: RunConfig, name: str) -> dict[str, Path]:
    if config.task.data_dir is None:
        raise SubmissionError("task.data_dir: missing; give the folder of GLUE's TSV files")
    folder = task_folder(config.task.data_dir, TASKS[name].folder or name)
    is_mnli = name.startswith("mnli")
    stems = MNLI if is_mnli else {STEMS.get(name, name.upper()): "test"}
    files = {stem: folder / f"{split}.tsv" for stem, split in stems.items()}
    for stem, path in files.items():
        if not path.is_file():
            raise SubmissionError(f"{path} does not exist, and {stem}.tsv needs its rows")
    diagnostic = folder.parent / "AX" / "AX.tsv"
    return files | ({"AX": diagnostic} if is_mnli and diagnostic.is_file() else {})


def outputs_of(model: Any, tokenizer: Any, path: Path, text: Sequence[str], most: int) -> Any:
    texts = [tuple(str(row.values[column]) for column in text) for row in read_tsv(path).records()]
    parts = []
    for start in range(0, len(texts), ROWS):
        columns = [list(column) for column in zip(*texts[start : start + ROWS], strict=True)]
        encoded = tokenizer(
            *columns, truncation=True, max_length=most, padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            parts.append(model(**encoded.to(model.device)).logits.float().cpu())
    outputs = torch.cat(parts)
    bad = int((~outputs.isfinite()).any(dim=1).sum())
    if bad:
        raise SubmissionError(
            f"{path}: the model's outputs are not finite for {bad} of {len(outputs)} rows"
        )
    return outputs


def answers_of(outputs: torch.Tensor, glue: GlueTask, labels: Sequence[str]) -> list[str]:
    """Return the answers as GLUE writes them; labels are matched by name."""
    if not glue.classes:
        return [f"{score:.3f}" for score in outputs[:, 0].clamp(0.0, 5.0).tolist()]  # of STS-B
    if set(labels) != set(glue.classes):
        raise SubmissionError(
            f"the model's labels ({', '.join(labels)}) are not those of the task "
            f"({', '.join(glue.classes)}); name them so in id2label of config.json"
        )
    names = [labels[number] for number in outputs.argmax(dim=1).tolist()]
    return [str(glue.classes.index(name)) if glue.numbered else name for name in names]


def write_submission(config: RunConfig, given: argparse.Namespace) -> list[Path]:
    if not config.task.data_name.startswith("glue/"):
        raise SubmissionError(f"task.dataset: {config.task.data_name} is not a GLUE task")
    name = glue_name(config.task.data_name)
    files, folder = test_files(config, name), given.model or config.output_dir / "final"
    if not (folder / "config.json").is_file():
        raise SubmissionError(f"{folder} holds no model; train first, or give --model FOLDER")
    options = {"trust_remote_code": given.trust_remote_code}
    model = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    answers = {}
    for stem, path in files.items():
        outputs = outputs_of(model, tokenizer, path, TASKS[name].text, config.task.max_length)
        answers[stem] = answers_of(outputs, TASKS[name], labels)
    given.to.mkdir(parents=True, exist_ok=True)
    for stem, column in answers.items():
        rows = "".join(f"{index}\t{answer}\n" for index, answer in enumerate(column))
        write_text(given.to / f"{stem}.tsv", f"index\tprediction\n{rows}")
    return [given.to / f"{stem}.tsv" for stem in answers]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file or folder")
    parser.add_argument("--to", type=Path, required=True, help="the folder of the files")
    parser.add_argument("--model", type=Path, help="the model to use in place of final/")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model's code")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run")
    given = parser.parse_intermixed_args(arguments)
    try:
        paths = write_submission(load_config(given.config, given.overrides), given)
    except MegakdError as error:
        print(f"glue_submission: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    return 0
