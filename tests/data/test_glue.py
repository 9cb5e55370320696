"""GLUE: the splits of the Hub, GLUE's own files, and what is refused."""

from __future__ import annotations

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

MRPC = ClassLabel(names=["not_equivalent", "equivalent"])


@pytest.fixture
def glue(monkeypatch):
    """Pairs of each split that the Hub has, and the list of what it is asked for."""
    asked, hub = [], DatasetDict()

    def write(splits, columns=("sentence1", "sentence2"), label=MRPC):
        features = Features(dict.fromkeys(columns, Value("string")) | {"label": label})
        for name, labels in splits.items():
            texts = {c: [f"{c} {name} {n}" for n in range(len(labels))] for c in columns}
            hub[name] = Dataset.from_dict({**texts, "label": labels}, features=features)

        def load_dataset(path, *, name, split, revision):
            asked.append((path, name, split))
            return hub[split]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return write


def test_a_task_has_the_splits_classes_and_metrics_of_the_hub(load, glue):
    asked = glue({"train": [1, 0], "validation": [0], "test": [-1, -1]})

    splits = load("glue/mrpc")

    assert asked == [("nyu-mll/glue", "mrpc", split) for split in ("train", "validation")]
    row = {"text": "sentence1 train 0", "text_pair": "sentence2 train 0", "label": 1}
    assert splits.train[0] == row
    assert splits.label_names == tuple(MRPC.names)
    assert splits.metrics == ("accuracy", "f1")
    assert (len(splits.validation), splits.test) == (1, None)


def test_scores_of_stsb_are_a_regression(load, glue):
    glue({"train": [3.75, 0.5], "validation": [5.0]}, label=Value("float32"))

    splits = load("glue/stsb", type="regression")

    assert splits.train["label"][:] == [3.75, 0.5]
    assert splits.metrics == ("pearson", "spearman")


def test_mnli_is_scored_on_the_validation_split_it_names(load, glue):
    splits = {"train": [0, 1], "validation_matched": [1], "validation_mismatched": [0, 1]}
    asked = glue(splits, columns=("premise", "hypothesis"))

    counts = {n: len(load(f"glue/mnli{n}").validation) for n in ("", "_matched", "_mismatched")}

    assert counts == {"": 1, "_matched": 1, "_mismatched": 2}
    assert {configuration for _, configuration, _ in asked} == {"mnli"}


@pytest.mark.parametrize(
    ("name", "train", "validation"), [("MRPC", 3668, 408), ("RTE", 2490, 277), ("WNLI", 635, 71)]
)
def test_the_files_of_glue_have_all_their_rows(load, name, train, validation, shared_data):
    """Without quotes, with a byte order mark, and with words or numbers as labels."""
    folder = shared_data / "glue" / name
    mrpc = {"text_columns": ("#1 String", "#2 String"), "label_column": "Quality"}

    splits = load(
        train_files=str(folder / "train.tsv"),
        validation_files=str(folder / "dev.tsv"),
        **(mrpc if name == "MRPC" else {}),
    )

    assert (len(splits.train), len(splits.validation)) == (train, validation)
    assert len(splits.label_names) == 2
