"""GLUE's folders as GLUE ships them, with a few made-up rows, and models that answer them."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tiny_runs import config_tree, write_config
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
)

from megakd.data.glue import TASKS

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEST_ROWS = 11
# What stands in a submission for the classes, as GLUE's own page lists them.
WORDS = {
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}
PARSES = "promptID,sentence1_parse,sentence2_parse"
STSB = "index,genre,filename,year,old_index,source1,source2,sentence1,sentence2"
PAIR = "index,sentence1,sentence2"
# folder, columns of the training files, columns of the test files
LAYOUTS = {
    name: (folder, columns.split(","), test_columns.split(","))
    for name, (folder, columns, test_columns) in {
        "cola": ("CoLA", "source,label,star,sentence", "index,sentence"),
        "sst2": ("SST-2", "sentence,label", "index,sentence"),
        "mrpc": (
            "MRPC",
            "Quality,#1 ID,#2 ID,#1 String,#2 String",
            "index,#1 ID,#2 ID,#1 String,#2 String",
        ),
        "stsb": ("STS-B", f"{STSB},score", STSB),
        "qqp": ("QQP", "id,qid1,qid2,question1,question2,is_duplicate", "id,question1,question2"),
        "mnli": (
            "MNLI",
            f"index,{PARSES},sentence1,sentence2,gold_label",
            f"index,{PARSES},sentence1,sentence2",
        ),
        "qnli": ("QNLI", "index,question,sentence,label", "index,question,sentence"),
        "rte": ("RTE", f"{PAIR},label", PAIR),
        "wnli": ("WNLI", f"{PAIR},label", PAIR),
    }.items()
}
TEST_STEMS = {"mnli": ("test_matched", "test_mismatched")}


def write_glue(folder: Path, name: str) -> Path:
    """The task's folder: training and validation rows of all classes, and `TEST_ROWS` to answer."""
    place, columns, test_columns = LAYOUTS[name]
    labels = _labels(name)
    for stem in ("train", TASKS[name].validation):
        rows = [_row(name, columns, f"{stem}{i}", label) for i, label in enumerate(labels)]
        header = [] if TASKS[name].header else [columns]
        _write(folder / place / f"{stem}.tsv", [*header, *rows])
    for stem in TEST_STEMS.get(name, ("test",)):
        rows = [_row(name, test_columns, f"{stem}{i}") for i in range(TEST_ROWS)]
        _write(folder / place / f"{stem}.tsv", [test_columns, *rows])
    return folder / place


def write_diagnostic(folder: Path) -> Path:
    """GLUE's diagnostic set, which has MNLI's classes and is answered by its models."""
    columns = ("index", "sentence1", "sentence2")
    rows = [_row("mnli", columns, f"ax{i}") for i in range(TEST_ROWS)]
    _write(folder / "AX" / "AX.tsv", [columns, *rows])
    return folder / "AX" / "AX.tsv"


def write_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *string.ascii_lowercase]) + "\n")
    return folder


def write_model(folder: Path, classes: Sequence[str]) -> Path:
    """A BERT with large random weights, so that its answers differ; no class: one score."""
    torch.manual_seed(0)
    names = dict(enumerate(classes or ["LABEL_0"]))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 32}
    config = BertConfig(
        vocab_size=len(SPECIAL) + 26,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=1.0,
        id2label=names,
        label2id={label: number for number, label in names.items()},
        **sizes,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_run(folder: Path, name: str, data: Path, **sections: object) -> Path:
    task = {
        "type": "classification" if TASKS[name].classes else "regression",
        "dataset": f"glue/{name}",
        "data_dir": str(data),
        "tokenizer": str(write_tokenizer(folder / "tokenizer")),
        "max_length": 32,
    }
    evaluation = {"per_device_eval_batch_size": 2}
    tree = config_tree(folder / "out", task, eval=evaluation, **sections)
    return write_config(folder / f"{name}.yaml", tree)


def _labels(name: str) -> list[str]:
    glue = TASKS[name]
    if not glue.classes:
        return ["0.500", "2.250", "5.000"]
    return [str(n) if glue.numbered else c for n, c in enumerate(glue.classes)]


def _row(name: str, columns: Sequence[str], seed: str, label: str = "") -> list[str]:
    glue, rng = TASKS[name], random.Random(f"{name} {seed}")
    known = {glue.label: label} | {column: _letters(rng) for column in glue.text}
    return [known.get(column, "0") for column in columns]


def _letters(rng: random.Random) -> str:
    return " ".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 12)))


def _write(path: Path, rows: Sequence[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def _texts_of(path: Path, name: str) -> Iterator[tuple[str, ...]]:
    header, *rows = (line.split("\t") for line in path.read_text().splitlines())
    places = [header.index(column) for column in TASKS[name].text]
    for row in rows:
        yield tuple(row[place] for place in places)


def answers_by_hand(name: str, model_folder: Path, tokenizer_folder: Path, test: Path) -> list[str]:
    """One row at a time, with nothing but transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(model_folder)
    tokenizer = BertTokenizer.from_pretrained(tokenizer_folder)
    with torch.no_grad():
        return [
            _answer(name, model(**tokenizer(*texts, return_tensors="pt")).logits[0])
            for texts in _texts_of(test, name)
        ]


def _answer(name: str, logits: torch.Tensor) -> str:
    if name == "stsb":
        return f"{min(5.0, max(0.0, float(logits[0]))):.3f}"
    number = int(logits.argmax())
    return WORDS[name][number] if name in WORDS else str(number)


def rows_of(path: Path) -> tuple[str, list[int], list[str]]:
    """Header, numbers and predictions of a submission file."""
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    indices, predictions = zip(*(row.split("\t") for row in rows), strict=True)
    return header, [int(index) for index in indices], list(predictions)
