from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakd.config.task import TaskConfig
from megakd.data.readers import read_csv, read_parquet
from megakd.data.splits import Splits, load_splits
from megakd.errors import DataError

ROWS = [("one fine day", 0), ("two, she said", 1), ("three", 0), ("vier für alle", 1)]


def load(path: Path, cache_dir: Path, **keys) -> Splits:
    task = TaskConfig(**{"type": "classification", "dataset": str(path), **keys})
    return load_splits(task, seed=1, cache_dir=cache_dir / "cache")


def as_csv(path: Path, rows: list[tuple], header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def as_tsv(path: Path, rows: list[tuple]) -> Path:
    lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def everything(splits: Splits) -> set[tuple[str, int]]:
    return {(row["text"], row["label"]) for part in splits[:2] for row in part}


def test_a_tsv_has_no_quoting_and_a_csv_has(tmp_path: Path):
    rows = [('" half a quote', 0), ('he said "no"', 1), ("x", 0)]
    tsv = as_tsv(tmp_path / "a.tsv", rows)
    table = as_csv(tmp_path / "a.csv", [*rows, ("two\nlines", 1)])

    assert everything(load(tsv, tmp_path)) == set(rows)
    assert everything(load(table, tmp_path)) == {*rows, ("two\nlines", 1)}


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path):
    path = as_csv(tmp_path / "x.csv", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    assert everything(load(path, tmp_path)) == set(ROWS)


def test_a_field_may_be_longer_than_python_reads_by_default(tmp_path: Path):
    limit = csv.field_size_limit()
    path = as_csv(tmp_path / "x.csv", [*ROWS, ("word " * 40_000, 1)])

    splits = load(path, tmp_path)

    assert max(len(text) for text, _ in everything(splits)) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "txt"])
def test_text_that_is_not_utf8_is_refused_with_its_line(kind: str, tmp_path: Path):
    lines = {
        "csv": (b"text,label", b"ok,1", b"caf\xe9,0"),
        "tsv": (b"text\tlabel", b"ok\t1", b"caf\xe9\t0"),
        "jsonl": (b'{"text": "a"}', b'{"text": "b"}', b'{"text": "caf\xe9"}'),
        "json": (b"[", b'"ok",', b'"caf\xe9"]'),
        "txt": (b"one", b"two", b"caf\xe9"),
    }[kind]
    path = tmp_path / f"x.{kind}"
    path.write_bytes(b"\n".join(lines))

    message = rf"x\.{kind}, line 3: text is not UTF-8 \(byte 0xe9 at position \d+\)"
    with pytest.raises(DataError, match=message):
        load(path, tmp_path, type="causal_lm")


def test_a_parquet_column_of_an_unknown_kind_is_refused_with_the_file(tmp_path: Path):
    kinds = {"text": {"_type": "KindOfALaterVersion"}}
    table = pa.table({"text": ["a"]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": kinds}})}
    )
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)

    with pytest.raises(DataError, match=r"rows\.parquet is not a readable parquet file: .*Kind"):
        read_parquet(path)


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path: Path):
    text = pa.StringArray.from_buffers(
        1, pa.py_buffer(b"\x00\x00\x00\x00\x04\x00\x00\x00"), pa.py_buffer(b"caf\xe9")
    )
    pq.write_table(pa.table({"text": text}), tmp_path / "x.parquet")

    with pytest.raises(DataError, match=r"x\.parquet: text is not UTF-8"):
        load(tmp_path / "x.parquet", tmp_path, type="causal_lm")


FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(FIELD))
def test_csv_gives_back_what_was_written(tmp_path: Path, texts: list[str]):
    path = as_csv(tmp_path / "x.csv", [(text, 1) for text in texts])

    assert [record.values["text"] for record in read_csv(path).records()] == texts


def test_empty_texts_are_counted_and_the_first_is_named_at_every_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = as_tsv(tmp_path / "x.tsv", [*ROWS, (" ", 1), ("", 0)])

    for _ in range(2):  # the second time, the rows come from the cache
        caplog.clear()
        assert len(load(path, tmp_path).train) + 1 == 6
        assert f"{path}: 2 row(s) with an empty text, the first is line 6" in caplog.text


def test_an_empty_half_of_a_pair_counts_as_an_empty_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rows = [("a", "b", 0), ("c", "", 1), ("d", "e", 1)]
    path = as_csv(tmp_path / "x.csv", rows, header=("premise", "hypothesis", "label"))

    load(path, tmp_path)

    assert "1 row(s) with an empty text, the first is line 3" in caplog.text


def test_blank_documents_are_left_out_of_a_language_task_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "x.jsonl"
    path.write_text('"one"\n"two"\n" "\n"three"\n')

    splits = load(path, tmp_path, type="causal_lm")

    assert len(splits.train) + len(splits.validation) == 3
    assert "1 row(s) with an empty text, the first is line 3; such rows are left out" in caplog.text


def test_bad_rows_of_texts_with_labels_are_named_together_or_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    good = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    bad = ['{"text": 7, "label": 0}', '{"text": ', '{"text": "a", "label": 0.5}']
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([*good, *bad]) + "\n", encoding="utf-8")
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(good) + "\n", encoding="utf-8")
    keys = {"dataset": None, "train_files": str(path), "validation_files": str(held)}

    with pytest.raises(DataError, match="3 rows that cannot be used") as caught:
        load(path, tmp_path, **keys)
    assert all(f"line {number}" in str(caught.value) for number in (5, 6, 7))

    for _ in range(2):  # the second time, the rows come from the cache
        caplog.clear()
        assert everything(load(path, tmp_path, **keys, bad_rows="drop")) == {*ROWS}
        assert "3 bad row(s) left out (task.bad_rows: drop)" in caplog.text
