"""GLUE: the files of its tasks, the Hub, and what is refused."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from megakd.data.glue import TASKS
from megakd.errors import ConfigError, DataError

STSB_HEADER = ["index", *(f"column{n}" for n in range(6)), "sentence1", "sentence2", "score"]
MNLI_HEADER = ["index", "promptID", "sentence1_parse", "sentence1", "sentence2", "gold_label"]


@pytest.mark.parametrize(("folder", "name"), [("SST-2", "sst2"), ("sst2", "SST-2"), (".", "sst2")])
def test_sst2_is_found_however_its_folder_is_written(load, write_rows, folder, name, tmp_path):
    for split in ("train", "dev"):
        path = tmp_path / "glue" / folder / f"{split}.tsv"
        write_rows(path, [("so good ", 1), ("bad", 0)], header=("sentence", "label"))
    write_rows(path.with_name("test.tsv"), [(0, "?")], header=("index", "sentence"))

    splits = load(f"glue/{name}", data_dir=tmp_path / "glue")

    assert splits.label_names == ("negative", "positive")
    assert splits.train["label"][:] == [1, 0]
    assert splits.metrics == ("accuracy",)
    assert splits.test is None


PAIR = {"text": "a", "text_pair": "b"}
ENTAILED = ("entailment", "not_entailment")
BOTH, ACCURACY = ("accuracy", "f1"), ("accuracy",)
NUMBERED = "index\tsentence1\tsentence2\tlabel"
# The lines of a file, and its first row, its classes and its metrics.
FILES = {
    "cola": (
        ["gj04\t1\t\tWe sailed.", "gj04\t0\t*\tSailed we the."],  # no header
        {"text": "We sailed.", "label": 1},
        ("unacceptable", "acceptable"),
        ("matthews_correlation",),
    ),
    "mrpc": (  # a byte order mark, and quotes that are text
        ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\t" Half\tand " more'],
        {"text": '" Half', "text_pair": 'and " more', "label": 1},
        ("not_equivalent", "equivalent"),
        BOTH,
    ),
    "stsb": (
        ["\t".join(STSB_HEADER), "0\tcaptions\tMSRvid\t2012\t1\tnone\tnone\ta\tb\t3.750"],
        {**PAIR, "label": 3.75},
        (),
        ("pearson", "spearman"),
    ),
    "rte": ([NUMBERED, "0\ta\tb\tnot_entailment"], {**PAIR, "label": 1}, ENTAILED, ACCURACY),
    "qnli": (
        ["index\tquestion\tsentence\tlabel", "0\ta\tb\tentailment"],
        {**PAIR, "label": 0},
        ENTAILED,
        ACCURACY,
    ),
    # numbers its classes the other way round
    "wnli": ([NUMBERED, "0\ta\tb\t1"], {**PAIR, "label": 1}, ENTAILED[::-1], ACCURACY),
    "qqp": (
        ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "4\t5\tbroken", "1\t2\t3\ta\tb\t1"],
        {**PAIR, "label": 1},
        ("not_duplicate", "duplicate"),
        BOTH,
    ),
}


@pytest.mark.parametrize(("name", "given"), FILES.items(), ids=FILES)
def test_the_files_of_a_task_are_read_as_they_are(load, name, given, tmp_path):
    lines, row, classes, metrics = given
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    splits = load(
        f"glue/{name}", data_dir=tmp_path, type="regression" if name == "stsb" else "classification"
    )

    assert splits.train[0] == row
    assert splits.label_names == classes
    assert splits.metrics == metrics


def test_a_bad_row_of_glue_is_left_out_if_the_task_says_so(load, write_rows, tmp_path):
    for split in ("train", "dev"):
        path = tmp_path / f"{split}.tsv"
        write_rows(path, [("a", 1), ("b", 7)], header=("sentence", "label"))

    assert len(load("glue/sst2", data_dir=tmp_path, bad_rows="drop").train) == 1


def test_mnli_is_scored_on_the_validation_split_it_names(load, write_rows, tmp_path):
    row = ("0", "1", "(p)", "a", "b", "neutral")
    for split, count in {"train": 1, "dev_matched": 1, "dev_mismatched": 2}.items():
        write_rows(tmp_path / "MNLI" / f"{split}.tsv", [row] * count, header=MNLI_HEADER)

    result = {
        name: load(f"glue/{name}", data_dir=tmp_path) for name in TASKS if name.startswith("mnli")
    }

    counts = {name: len(splits.validation) for name, splits in result.items()}
    assert counts == {"mnli": 1, "mnli_matched": 1, "mnli_mismatched": 2}
    assert result["mnli"].label_names == ("entailment", "neutral", "contradiction")
    assert load("glue/mnli-mismatched", data_dir=tmp_path).train[0]["label"] == 1


WRONG = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n"
REFUSED = {
    "an unknown task": ("sst3", {}, r"no GLUE task 'sst3'; did you mean glue/sst2\?"),
    "a type of another task": ("stsb", {}, r"type: must be regression for glue/stsb \(got class"),
    "no folder": (
        "sst2",
        {"data_dir": Path("nope")},
        r"task\.data_dir: the folder .*nope does not exist",
    ),
    "a folder of another task": ("sst2", {}, r"train\.tsv does not exist, and .* GLUE task sst2"),
    # tests/conftest.py sets HF_HUB_OFFLINE
    "no hub": (
        "sst2",
        {"data_dir": None},
        r"the Hub cannot be reached .* nyu-mll/glue \(sst2\), .* set task\.data_dir",
    ),
    "no file": ("sst2", {"train": "sentence\tlabel\na\t1\n"}, r"dev\.tsv does not exist"),
    "other columns": (
        "sst2",
        {"train": WRONG, "dev": WRONG},
        r"column 'sentence' .* does not exist; the columns are index, sentence1",
    ),
    "a label outside the classes": (
        "sst2",
        dict.fromkeys(("train", "dev"), "sentence\tlabel\na\t1\nb\t2\n"),
        r"train\.tsv, line 3: label 2 is outside 0\.\.1",
    ),
}


@pytest.mark.parametrize(("name", "given", "message"), REFUSED.values(), ids=REFUSED)
def test_a_task_that_cannot_be_read_is_refused(load, tmp_path, name, given, message):
    (tmp_path / "RTE").mkdir()
    keys = {"data_dir": tmp_path, **given}
    for split in ("train", "dev"):
        if split in keys:
            (tmp_path / f"{split}.tsv").write_text(keys.pop(split))
    with pytest.raises((ConfigError, DataError), match=message):
        load(f"glue/{name}", **keys)


def test_the_hub_gives_the_same_rows_as_the_folders(load, write_rows, tmp_path, monkeypatch):
    names = ClassLabel(names=["not_equivalent", "equivalent"])
    string = Value("string")
    features = Features({"sentence1": string, "sentence2": string, "label": names})
    rows = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [1, 0]}
    labelled, hidden = (
        Dataset.from_dict(columns, features=features)
        for columns in (rows, rows | {"label": [-1, -1]})
    )
    hub = DatasetDict(train=labelled, validation=labelled, test=hidden)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *what: asked.append(what) or hub)
    header = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    for split in ("train", "dev"):
        lines = [(1, "", "", "a", "b"), (0, "", "", "c", "d")]
        write_rows(tmp_path / f"{split}.tsv", lines, header=header)

    online, offline = load("glue/mrpc"), load("glue/mrpc", data_dir=tmp_path)

    assert asked == [("nyu-mll/glue", "mrpc")]
    assert online.train.to_list() == offline.train.to_list()
    assert online.label_names == offline.label_names
    assert online.test is None


@pytest.mark.parametrize(
    ("name", "train", "validation"),
    [
        ("mrpc", 3668, 408),
        ("rte", 2490, 277),
        ("stsb", 5749, 1500),
        ("wnli", 635, 71),
    ],
)
def test_the_real_files_have_all_their_rows(load, name, train, validation, shared_data):
    type_ = "classification" if TASKS[name].classes else "regression"

    splits = load(f"glue/{name}", data_dir=shared_data / "glue", type=type_)

    assert (len(splits.train), len(splits.validation)) == (train, validation)
    if type_ == "classification":
        assert set(splits.train["label"]) == set(range(len(splits.label_names)))
    else:
        assert 0 <= min(splits.train["label"]) < max(splits.train["label"]) <= 5
