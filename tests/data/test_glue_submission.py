"""GLUE's test rows: in order, without labels, from the folders and from the Hub."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from tiny_glue import TEST_ROWS, write_diagnostic, write_glue

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE
from megakd.data.glue import TASKS
from megakd.data.glue_submission import SUBMISSIONS, submission_rows
from megakd.errors import DataError


def task_on(name: str, folder: Path | None) -> TaskConfig:
    return TaskConfig(type="classification", dataset=f"glue/{name}", data_dir=folder)


def test_every_task_has_a_submission():
    assert set(SUBMISSIONS) == set(TASKS)


def test_rows_are_all_there_in_order_and_carry_no_label(tmp_path):
    folder = write_glue(tmp_path, "cola")
    lines = ["index\tsentence", "0\tb a", "1\tA", "2\tb a", '3\t"']
    (folder / "test.tsv").write_text("\n".join(lines) + "\n")

    found = submission_rows(task_on("CoLA", tmp_path), cache_dir=tmp_path / "cache")

    assert list(found.rows) == ["CoLA"]
    assert found.rows["CoLA"]["text"][:] == ["b a", "A", "b a", '"']
    assert found.rows["CoLA"]["label"][:] == [IGNORE] * 4


def test_limits_of_the_run_leave_the_test_rows_alone(tmp_path):
    write_glue(tmp_path, "sst2")
    task = TaskConfig(
        type="classification",
        dataset="glue/sst2",
        data_dir=tmp_path,
        max_eval_examples=2,
        labelled_examples=1,
    )

    found = submission_rows(task, cache_dir=tmp_path / "cache")

    assert len(found.rows["SST-2"]) == TEST_ROWS


@pytest.mark.parametrize("name", ["mnli", "mnli_matched", "mnli_mismatched"])
@pytest.mark.parametrize("inside", ["", "MNLI"])
def test_mnli_is_answered_on_both_splits_and_the_diagnostic_set(tmp_path, name, inside):
    write_glue(tmp_path, "mnli")
    write_diagnostic(tmp_path)

    found = submission_rows(task_on(name, tmp_path / inside), cache_dir=tmp_path / "cache")

    assert list(found.rows) == ["MNLI-m", "MNLI-mm", "AX"]
    assert len({rows["text"][0] for rows in found.rows.values()}) == 3


@pytest.mark.parametrize("place", ["AX.tsv", "diagnostic/diagnostic.tsv"])
def test_the_diagnostic_set_is_found_under_its_other_names(tmp_path, place):
    write_glue(tmp_path, "mnli")
    original = write_diagnostic(tmp_path)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    original.rename(tmp_path / place)

    found = submission_rows(task_on("mnli", tmp_path), cache_dir=tmp_path / "cache")

    assert "AX" in found.rows


def test_a_changed_test_file_is_read_anew(tmp_path):
    folder = write_glue(tmp_path, "sst2")
    task = task_on("sst2", tmp_path)
    before = submission_rows(task, cache_dir=tmp_path / "cache")
    (folder / "test.tsv").write_text("index\tsentence\n0\tother\n")

    after = submission_rows(task, cache_dir=tmp_path / "cache")

    assert after.rows["SST-2"]["text"][:] == ["other"]
    assert after.content_hash != before.content_hash


def test_a_missing_test_file_says_what_it_is_for(tmp_path):
    folder = write_glue(tmp_path, "mnli")
    (folder / "test_mismatched.tsv").unlink()

    message = r"test_mismatched\.tsv does not exist, and the submission file MNLI-mm\.tsv needs"
    with pytest.raises(DataError, match=message):
        submission_rows(task_on("mnli", tmp_path), cache_dir=tmp_path / "cache")


def test_a_broken_line_is_refused_for_every_row_needs_an_answer(tmp_path):
    folder = write_glue(tmp_path, "qqp")
    with (folder / "test.tsv").open("a") as file:
        file.write("11\tone field too few\n")

    with pytest.raises(DataError, match=r"test\.tsv, line 13: 2 fields, but there are 3 columns"):
        submission_rows(task_on("qqp", tmp_path), cache_dir=tmp_path / "cache")


def test_a_test_file_of_other_columns_is_refused(tmp_path):
    folder = write_glue(tmp_path, "rte")
    (folder / "test.tsv").write_text("index\tsentence\n0\ta\n")

    with pytest.raises(DataError, match=r"column 'sentence1' .* does not exist; the columns are"):
        submission_rows(task_on("rte", tmp_path), cache_dir=tmp_path / "cache")


def hub_split(texts: list[str], label: int) -> Dataset:
    columns = {"premise": texts, "hypothesis": texts, "label": [label] * len(texts)}
    return Dataset.from_dict(columns)


@pytest.mark.parametrize("has_diagnostic", [True, False])
def test_the_hub_gives_the_test_rows_without_looking_at_labels(
    tmp_path, monkeypatch, caplog, has_diagnostic
):
    # MRPC's test split on the Hub has true labels, the others have -1: none may matter.
    splits = {"test_matched": hub_split(["a", "b"], -1), "test_mismatched": hub_split(["c"], 7)}

    def load_dataset(_: str, configuration: str) -> DatasetDict:
        if configuration == "mnli":
            return DatasetDict(splits)
        if not has_diagnostic:
            raise ConnectionError("offline")
        return DatasetDict({"test": hub_split(["d"], -1)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    found = submission_rows(task_on("mnli", None), cache_dir=tmp_path)

    texts = {stem: rows["text_pair"][:] for stem, rows in found.rows.items()}
    expected = {"MNLI-m": ["a", "b"], "MNLI-mm": ["c"]}
    assert texts == expected | ({"AX": ["d"]} if has_diagnostic else {})
    assert {label for rows in found.rows.values() for label in rows["label"]} == {IGNORE}
    assert ("AX.tsv is not written: the Hub cannot be reached" in caplog.text) != has_diagnostic


def test_a_hub_copy_without_test_split_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_: DatasetDict({"train": Dataset.from_dict({"a": [1]})})
    )

    with pytest.raises(
        DataError, match=r"nyu-mll/glue \(rte\) has no split 'test'; set task\.data"
    ):
        submission_rows(task_on("rte", None), cache_dir=tmp_path)
