from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from megakd.config.task import TaskConfig
from megakd.data.glue import TASKS
from megakd.data.splits import Splits, load_splits
from megakd.errors import ConfigError, DataError

STSB_HEADER = ["index", *(f"column{n}" for n in range(6)), "sentence1", "sentence2", "score"]
MNLI_HEADER = ["index", "promptID", "sentence1_parse", "sentence1", "sentence2", "gold_label"]


def write(path: Path, *rows: list[str], bom: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join("\t".join(row) + "\n" for row in rows)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())


def load(name: str, folder: Path | None, tmp_path: Path, *, type_: str = "classification"):
    keys = {"type": type_, "dataset": f"glue/{name}", "data_dir": folder}
    task = TaskConfig(**keys)
    return load_splits(task, seed=1, cache_dir=tmp_path / "cache")


def in_both(folder: Path, *rows: list[str], bom: bool = False, dev: str = "dev") -> None:
    write(folder / "train.tsv", *rows, bom=bom)
    write(folder / f"{dev}.tsv", *rows, bom=bom)


@pytest.mark.parametrize("folder", ["SST-2", "sst2", "SST2", "."])
@pytest.mark.parametrize("name", ["sst2", "SST-2"])
def test_sst2_is_found_however_its_folder_is_written(folder, name, tmp_path):
    in_both(tmp_path / "glue" / folder, ["sentence", "label"], ["so good ", "1"], ["bad", "0"])
    write(tmp_path / "glue" / folder / "test.tsv", ["index", "sentence"], ["0", "?"])

    splits = load(name, tmp_path / "glue", tmp_path)

    assert splits.label_names == ("negative", "positive")
    assert splits.train["label"][:] == [1, 0]
    assert splits.metrics == ("accuracy",)
    assert splits.test is None


def test_cola_has_no_header(tmp_path):
    in_both(tmp_path, ["gj04", "1", "", "We sailed."], ["gj04", "0", "*", "Sailed we the."])

    splits = load("cola", tmp_path, tmp_path)

    assert splits.train["text"][:] == ["We sailed.", "Sailed we the."]
    assert splits.label_names == ("unacceptable", "acceptable")
    assert splits.metrics == ("matthews_correlation",)


def test_mrpc_has_a_byte_order_mark_and_quotes_that_are_text(tmp_path):
    header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    in_both(tmp_path, header, ["1", "7", "8", '" Half a quote', 'and " more'], bom=True)

    splits = load("mrpc", tmp_path, tmp_path)

    assert splits.train[0] == {"text": '" Half a quote', "text_pair": 'and " more', "label": 1}
    assert splits.metrics == ("accuracy", "f1")


def test_stsb_has_ten_columns_and_scores(tmp_path):
    row = ["0", "captions", "MSRvid", "2012", "1", "none", "none", 'A "plane', "An air", "3.800"]
    in_both(tmp_path, STSB_HEADER, row)

    splits = load("stsb", tmp_path, tmp_path, type_="regression")

    assert splits.train[0]["text"] == 'A "plane'
    assert splits.train[0]["label"] == pytest.approx(3.8)
    assert splits.label_names == ()
    assert splits.metrics == ("pearson", "spearman")


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("rte", ["index", "sentence1", "sentence2", "label"]),
        ("qnli", ["index", "question", "sentence", "label"]),
    ],
)
def test_words_are_labels_in_glues_order(name, header, tmp_path):
    rows = [["0", "a", "b", "not_entailment"], ["1", "c", "d", "entailment"]]
    in_both(tmp_path, header, *rows)

    splits = load(name, tmp_path, tmp_path)

    assert splits.label_names == ("entailment", "not_entailment")
    assert splits.train[0] == {"text": "a", "text_pair": "b", "label": 1}


def test_wnli_numbers_its_classes_the_other_way_round(tmp_path):
    in_both(tmp_path, ["index", "sentence1", "sentence2", "label"], ["0", "a", "b", "1"])

    splits = load("wnli", tmp_path, tmp_path)

    assert splits.label_names[splits.train["label"][0]] == "entailment"


def test_broken_lines_of_qqp_are_left_out(tmp_path):
    header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
    in_both(tmp_path, header, ["1", "2", "3", "a?", "b?", "1"], ["4", "5", "a broken line"])

    splits = load("qqp", tmp_path, tmp_path)

    assert splits.train.to_list() == [{"text": "a?", "text_pair": "b?", "label": 1}]
    assert splits.metrics == ("accuracy", "f1")


def test_mnli_is_scored_on_the_validation_split_it_names(tmp_path):
    row = ["0", "1", "(p)", "a", "b", "neutral"]
    in_both(tmp_path / "MNLI", MNLI_HEADER, row, dev="dev_matched")
    write(tmp_path / "MNLI" / "dev_mismatched.tsv", MNLI_HEADER, row, row)

    found = {name: load(name, tmp_path, tmp_path) for name in TASKS if name.startswith("mnli")}

    assert {name: len(splits.validation) for name, splits in found.items()} == {
        "mnli": 1,
        "mnli_matched": 1,
        "mnli_mismatched": 2,
    }
    assert found["mnli"].label_names == ("entailment", "neutral", "contradiction")
    assert load("mnli-mismatched", tmp_path, tmp_path).train[0]["label"] == 1


PAIR = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n"
REFUSED = {
    "an unknown task": ("sst3", {}, r"no GLUE task 'sst3'; did you mean glue/sst2\?"),
    "a type of another task": ("stsb", {}, r"type: must be regression for glue/stsb \(got class"),
    "columns": (
        "sst2",
        {"label_column": "x"},
        r"task\.label_column: not supported with glue/sst2, which has its own columns",
    ),
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
        {"train": PAIR, "dev": PAIR},
        r"column 'sentence' .* does not exist; the columns are index, sentence1",
    ),
    "a label outside the classes": (
        "sst2",
        dict.fromkeys(("train", "dev"), "sentence\tlabel\na\t1\nb\t2\n"),
        r"train\.tsv, line 3: label 2 is outside 0\.\.1",
    ),
}


@pytest.mark.parametrize(("name", "given", "message"), REFUSED.values(), ids=REFUSED)
def test_a_task_that_cannot_be_read_is_refused(tmp_path, name, given, message):
    (tmp_path / "RTE").mkdir()
    keys = {"data_dir": tmp_path, **given}
    for split in ("train", "dev"):
        if split in keys:
            (tmp_path / f"{split}.tsv").write_text(keys.pop(split))
    task = TaskConfig(type="classification", dataset=f"glue/{name}", **keys)

    with pytest.raises((ConfigError, DataError), match=message):
        load_splits(task, seed=1, cache_dir=tmp_path / "cache")


def test_the_hub_gives_the_same_rows_as_the_folders(tmp_path, monkeypatch):
    names = ClassLabel(names=["not_equivalent", "equivalent"])
    string = Value("string")
    features = Features({"sentence1": string, "sentence2": string, "label": names})
    rows = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [1, 0]}
    hidden = rows | {"label": [-1, -1]}
    hub = DatasetDict(
        {
            "train": Dataset.from_dict(rows, features=features),
            "validation": Dataset.from_dict(rows, features=features),
            "test": Dataset.from_dict(hidden, features=features),
        }
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *what: asked.append(what) or hub)
    header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    in_both(tmp_path, header, ["1", "", "", "a", "b"], ["0", "", "", "c", "d"])

    online: Splits = load("mrpc", None, tmp_path)
    offline: Splits = load("mrpc", tmp_path, tmp_path)

    assert asked == [("nyu-mll/glue", "mrpc")]
    assert online.train.to_list() == offline.train.to_list()
    assert online.label_names == offline.label_names
    assert online.test is None


@pytest.mark.parametrize(
    ("name", "train", "validation"),
    [
        ("sst2", 67349, 872),
        ("cola", 8551, 1043),
        ("mrpc", 3668, 408),
        ("rte", 2490, 277),
        ("stsb", 5749, 1500),
        ("wnli", 635, 71),
    ],
)
def test_the_real_files_have_all_their_rows(name, train, validation, shared_data, tmp_path):
    type_ = "classification" if TASKS[name].classes else "regression"

    splits = load(name, shared_data / "glue", tmp_path, type_=type_)

    assert (len(splits.train), len(splits.validation)) == (train, validation)
    if type_ == "classification":
        assert set(splits.train["label"]) == set(range(len(splits.label_names)))
    else:
        assert 0 <= min(splits.train["label"]) < max(splits.train["label"]) <= 5
