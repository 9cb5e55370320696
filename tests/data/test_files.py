"""Local files of every format: their rows, splits, columns and labels; and what is refused."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakd.data.readers import pieces, records_of
from megakd.errors import ConfigError, DataError

ROWS = [("one fine day", 0), ("two, she said", 1), ("three", 0), ("vier für alle", 1)]


def everything(splits):
    return {(row["text"], row["label"]) for part in splits[:2] for row in part}


def texts_of(splits):
    return [*splits.train["text"], *splits.validation["text"]]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_rows(load, write_rows, kind, tmp_path):
    splits = load(write_rows(tmp_path / f"data.{kind}", ROWS))

    assert everything(splits) == set(ROWS)
    assert splits.label_names == ("0", "1")
    assert splits.metrics == ("accuracy",)
    assert splits.train.features == Features({"text": Value("string"), "label": Value("int64")})
    assert splits.test is None


@pytest.mark.parametrize("name", ["valid", "dev"])
def test_a_folder_is_read_by_the_names_of_its_splits(load, write_rows, name, tmp_path):
    for split, rows in {"train": ROWS, name: ROWS[:2], "test": ROWS[2:]}.items():
        write_rows(tmp_path / f"{split}.csv", rows)
    (tmp_path / "categories.json").write_text("[]")

    splits = load(tmp_path)

    assert [len(part) for part in splits[:3]] == [4, 2, 2]


@pytest.mark.parametrize(
    ("kind", "split", "missing", "first"),
    [
        ("parquet", "train", 0, 0),
        ("jsonl", "validation", 2, 0),
        ("json", "test", 3, 0),
        ("csv", "train", 3, 1),
    ],
)
def test_a_missing_shard_is_refused_with_its_name(
    load, write_rows, kind, split, missing, first, tmp_path
):
    if split != "train":
        write_rows(tmp_path / "train.jsonl", ROWS)
    for number in {*range(first, first + 4)} - {missing}:
        write_rows(tmp_path / f"{split}-{number:05}-of-00004.{kind}", ROWS)

    name = rf"{split}-{missing:05}-of-00004\.{kind}"
    with pytest.raises(DataError, match=f"the shard {name} is missing, and 3 of 00004 are there"):
        load(tmp_path)


@pytest.mark.parametrize("hashes", [("", ""), ("-0f3b9c0d", "-1f3b9c0d")], ids=["plain", "hash"])
def test_shards_of_a_split_are_read_one_after_the_other(load, write_rows, hashes, tmp_path):
    for number, name in enumerate(hashes):
        rows = ROWS[2 * number :][:2]
        write_rows(tmp_path / f"train-{number:05}-of-00002{name}.parquet", rows)
    write_rows(tmp_path / f"validation-00000-of-00001{hashes[0]}.parquet", ROWS[:1])

    splits = load(tmp_path)

    assert splits.train["text"][:] == [text for text, _ in ROWS]
    assert not splits.is_cut


def test_shards_without_rows_are_passed_over(load, write_rows, tmp_path):
    for number, rows in enumerate([[], ROWS, []]):
        write_rows(tmp_path / f"part-{number}.jsonl", rows)

    splits = load(type="mlm", train_files=str(tmp_path / "part-*.jsonl"))

    assert len(texts_of(splits)) == len(ROWS)


def test_a_shard_that_a_pattern_matches_is_missed_and_others_are_not(load, write_rows, tmp_path):
    for number in (0, 1, 3):
        write_rows(tmp_path / f"part-{number:05}-of-00004.jsonl", ROWS)

    some = load(type="mlm", train_files=str(tmp_path / "part-0000[01]*"))

    assert len(texts_of(some)) == 8
    message = r"train_files: the shard part-00002-of-00004\.jsonl is miss"
    with pytest.raises(DataError, match=message):
        load(type="mlm", train_files=str(tmp_path / "part-*.jsonl"))


def test_words_as_labels_are_numbered_in_sorted_order_and_columns_may_be_named(
    load, write_rows, tmp_path
):
    rows = [("spam", "a b", "x"), ("ham", "c d", "x"), ("spam", "e f", "x"), ("ham", "g h", "x")]
    path = write_rows(tmp_path / "x.csv", rows, header=("topic", "body", "text"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark

    splits = load(path, text_columns=("body",), label_column="topic")

    assert splits.label_names == ("ham", "spam")
    assert splits.train.column_names == ["text", "label"]
    assert everything(splits) == {("a b", 1), ("c d", 0), ("e f", 1), ("g h", 0)}


def test_pairs_are_found_by_their_usual_names(load, write_rows, tmp_path, caplog):
    rows = [("a", "a", 0), ("c", "", 1), ("d", "d", 1)]
    header = ("premise", "hypothesis", "label")

    splits = load(write_rows(tmp_path / "x.csv", rows, header=header))

    assert splits.train.column_names == ["text", "text_pair", "label"]
    assert {row["text"] for row in splits.train if row["text"] != row["text_pair"]} <= {"c"}
    assert "1 row(s) with an empty text, the first is line 3" in caplog.text


def test_a_json_list_of_texts_is_a_list_of_documents(load, tmp_path):
    path = tmp_path / "stories.json"
    path.write_text(json.dumps(["one day", "once upon a time", "the end"]))

    splits = load(path, type="causal_lm")

    assert splits.train.column_names == ["text"]
    assert len(texts_of(splits)) == 3
    assert splits.metrics == ("perplexity",)


def test_two_text_columns_make_one_document_of_a_language_model(load, write_rows, tmp_path):
    rows = [("why?", "so"), ("who?", "me"), (" ", "")]
    path = write_rows(tmp_path / "train.jsonl", rows, header=("q", "a"))

    splits = load(path, type="causal_lm", text_columns=("q", "a"))

    assert {*texts_of(splits)} == {"why?\nso", "who?\nme"}


def test_a_folder_of_texts_is_many_documents(load, tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name} begins.\n\n{name} ends.\n")
    (tmp_path / "._a.txt").write_bytes(b"\x00\x05\xb0")  # hidden: no document

    splits = load(tmp_path, type="causal_lm")

    expected = [f"{n} {verb}." for n in "abc" for verb in ("begins", "ends")]
    assert sorted(texts_of(splits)) == expected


def test_a_text_with_its_own_validation_file_keeps_long_pieces(load, tmp_path):
    (tmp_path / "train.txt").write_text("A paragraph.\n\n" * 50)
    (tmp_path / "validation.txt").write_text("Another.\n\n" * 50)

    splits = load(tmp_path, type="causal_lm")

    assert (len(splits.train), len(splits.validation)) == (1, 1)


@given(st.lists(st.text(alphabet="ab \n", max_size=30), max_size=20), st.integers(1, 60))
@settings(max_examples=40)
def test_pieces_hold_all_the_text_in_its_order(blocks, length):
    lines = "\n".join(blocks).splitlines(keepends=True)

    result = list(pieces(iter(lines), length))

    assert "".join("".join(text for _, text in result).split()) == "".join("".join(lines).split())
    assert [first for first, _ in result] == sorted({first for first, _ in result})
    assert all(text.strip() for _, text in result)


# pandas writes whole numbers as 1.0 where some are missing
@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("csv", ["1.0", "", "0.0", -100]),
        ("csv", ["1", "NaN", "0", "nan"]),
        ("jsonl", [1, None, 0, None]),
    ],
)
def test_rows_may_have_no_label(load, write_rows, tmp_path, kind, labels):
    write_rows(tmp_path / f"train.{kind}", list(zip("abcd", labels, strict=True)))
    write_rows(tmp_path / "dev.csv", ROWS)

    splits = load(tmp_path)

    assert splits.train["label"][:] == [1, -100, 0, -100]
    assert splits.label_names == ("0", "1")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_numbers_with_leading_zeros_are_names(load, write_rows, tmp_path, kind):
    codes = ("007", "10", "00", "10")
    for name in ("train", "dev"):
        write_rows(tmp_path / f"{name}.{kind}", list(zip("abcd", codes, strict=True)))

    splits = load(tmp_path)

    assert splits.label_names == ("00", "007", "10")
    assert splits.train["label"][:] == [1, 2, 0, 2]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_scores_are_read_for_regression(load, write_rows, tmp_path, kind):
    for name in ("train", "dev"):
        scores = ["0.5", "", 3] if kind == "csv" else [Decimal("0.5"), None, Decimal("3.0")]
        rows = list(zip("abc", scores, strict=True))
        write_rows(tmp_path / f"{name}.{kind}", rows, header=("text", "score"))

    splits = load(tmp_path, type="regression")

    assert splits.train["label"][:] == pytest.approx([0.5, float("nan"), 3], nan_ok=True)
    assert splits.train.features["label"] == Value("float32")
    assert splits.label_names == ()
    assert splits.metrics == ("pearson", "spearman")


def test_real_files_are_read(load, shared_data):
    banking = load(shared_data / "banking77", label_column="category")
    books = load(shared_data / "lm" / "standard-ebooks", type="causal_lm")

    assert len(banking.train) + len(banking.validation) == 10003
    assert (len(banking.test), len(banking.label_names)) == (3080, 77)
    assert 0.03 < len(books.validation) / len(books.train) < 0.08


def test_files_that_get_the_ending_of_another_format_are_read_again(load, tmp_path):
    def texts(ending):
        paths = sorted(map(str, tmp_path.glob(f"*.{ending}")))
        return {*texts_of(load(type="mlm", train_files=tuple(paths)))}

    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(f'text\n"{name} 1"\n{name} 2\n')

    assert texts("csv") == {"a 1", "a 2", "b 1", "b 2"}
    for name in "ab":
        (tmp_path / f"{name}.csv").rename(tmp_path / f"{name}.tsv")
    assert texts("tsv") == {'"a 1"', "a 2", '"b 1"', "b 2"}


def test_long_fields_are_read(write_rows, tmp_path):
    """Python reads shorter fields by default."""
    path = write_rows(tmp_path / "a.csv", [("a", 0), ("word " * 40_000, 1)])

    assert [len(record.values["text"]) for record in records_of(path)] == [1, 200_000]


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_test_rows_without_a_column_of_labels_are_not_scored(load, tmp_path, kind):
    """The column of the index, which pandas writes, has no name."""
    for split in ("train", "dev"):
        (tmp_path / f"{split}.csv").write_text(",text,label\n0,a,0\n1,b,1\n2,c,1\n")
    (tmp_path / "test.csv").write_text(",text\n0,d\n1,e\n")

    assert load(tmp_path, type=kind).test is None


LATER = {"info": {"features": {"text": {"_type": "KindOfALaterVersion"}}}}
BAD_PARQUET = {
    "a kind of a later version": (
        pa.table({"text": ["a"]}).replace_schema_metadata({"huggingface": json.dumps(LATER)}),
        r"rows\.parquet is not a readable parquet file: .*Kind",
    ),
    "two columns of one name": (
        pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
        r"rows\.parquet: column 'text' occurs more than once",
    ),
    "not UTF-8": (
        pa.table({"text": pa.array([b"caf\xe9"]).view(pa.string())}),
        r"rows\.parquet: text is not UTF-8",
    ),
}


@pytest.mark.parametrize(("table", "message"), BAD_PARQUET.values(), ids=BAD_PARQUET)
def test_a_parquet_file_that_cannot_be_read_is_refused(load, tmp_path, table, message):
    pq.write_table(table, tmp_path / "rows.parquet")

    with pytest.raises(DataError, match=message):
        load(tmp_path / "rows.parquet", type="causal_lm")


def test_parquet_columns_that_are_no_text_and_no_label_have_no_value(tmp_path, load):
    kind = pa.map_(pa.string(), pa.string())
    more = pa.array([[("k", "v")]] * 2, kind)
    columns = {"text": ["a", "b"], "label": [0, 1], "messages": more}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")

    assert [record.values for record in records_of(tmp_path / "rows.parquet")] == [
        {"text": "a", "label": 0},
        {"text": "b", "label": 1},
    ]
    with pytest.raises(DataError, match=r"row 1.*'messages'"):  # not the texts, silently
        load(tmp_path / "rows.parquet", type="causal_lm")


FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(FIELD))
def test_csv_gives_back_what_was_written(write_rows, tmp_path, texts):
    path = write_rows(tmp_path / "x.csv", [(text, 1) for text in texts])

    assert [record.values["text"] for record in records_of(path)] == texts


def test_empty_texts_are_counted_and_the_first_is_named_at_every_start(
    load, write_rows, tmp_path, caplog
):
    path = write_rows(tmp_path / "x.tsv", [*ROWS, (" ", 1), ("", 0)])

    for _ in range(2):  # the second time, the rows come from the cache
        caplog.clear()
        assert len(texts_of(load(path))) == 6
        assert f"{path}: 2 row(s) with an empty text, the first is line 6" in caplog.text


def test_blank_documents_are_left_out_of_a_language_task_and_counted(load, tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    path.write_text('"one"\n"two"\n" "\n"three"\n')

    assert len(texts_of(load(path, type="causal_lm"))) == 3
    assert "1 row(s) with an empty text, the first is line 3; such rows are left out" in caplog.text


def test_bad_rows_of_texts_with_labels_are_named_together_or_left_out(
    load, write_rows, tmp_path, caplog
):
    path, held = (write_rows(tmp_path / f"{name}.jsonl", ROWS) for name in ("x", "held"))
    bad = ['{"text": 7, "label": 0}', '{"text": ', '{"text": "a", "label": 0.5}']
    path.write_text("\n".join([path.read_text(), *bad]) + "\n")
    keys = {"train_files": str(path), "validation_files": str(held)}

    with pytest.raises(DataError, match="3 rows that cannot be used") as caught:
        load(**keys)
    assert all(f"line {number}" in str(caught.value) for number in (5, 6, 7))

    path.write_text(path.read_text().replace('"text": 7, "label": 0', '"text": 7, "label": "no"'))
    for _ in range(2):  # the second time, the rows come from the cache
        caplog.clear()
        splits = load(**keys, bad_rows="drop")
        assert everything(splits) == {*ROWS}
        assert splits.label_names == ("0", "1")
        assert "3 bad row(s) left out (task.bad_rows: drop)" in caplog.text


GOOD = "text,label\na,0\nb,1\nc,0\n"
LANGUAGE = {"type": "causal_lm"}
SCORES = {"type": "regression"}


def labels(*values: object) -> str:
    return "text,label\n" + "".join(f"text {n},{value}\n" for n, value in enumerate(values))


# The files (one file is the data set, several are a folder), the message, and keys of the task.
CASES: list[tuple[Any, ...]] = [
    # Names of files
    ({"train.csv": GOOD, "train.jsonl": ""}, r"train\.csv and train\.jsonl are names of the same"),
    ({"train-0-of-1-a.csv": GOOD, "train-0-of-1-b.csv": GOOD}, r"1-b\.csv is there with another h"),
    ({"train-0-of-1.csv": GOOD, "train.csv": GOOD}, r"train-\*-of-1\.csv and train\.csv are names"),
    ({"train-0-of-1.csv": GOOD, "train-0-of-2.csv": GOOD}, r"train-\*-of-1\.csv and train-\*-of-2"),
    ({"data.csv": GOOD, "more.csv": GOOD}, r"train\.\* does not exist .* the folder holds: data"),
    ({"x.xlsx": "PK"}, r"x\.xlsx has an unsupported ending; supported: \.csv"),
    *(
        ({}, rf"{name} does not exist", {"dataset": given})
        for name, given in ((r"nope\.csv", "nope.csv"), ("nope", "./nope"), ("a/b/c", "a/b/c"))
    ),
    # Rows
    ({"x.csv": ""}, r"x\.csv has no rows"),
    ({"x.csv": "text,label\n"}, r"x\.csv has no rows"),
    ({"x.tsv": ""}, r"x\.tsv has no rows", LANGUAGE),
    ({"x.jsonl": ""}, r"x\.jsonl has no rows", LANGUAGE),
    ({"x.txt": ""}, r"x\.txt has no rows", LANGUAGE),
    *(
        (
            {f"x.{kind}": content},
            rf"x\.{kind}, line 3: text is not UTF-8 \(byte 0xe9 at position \d+\)",
            LANGUAGE,
        )
        for kind, content in (
            ("csv", "text,label\nok,1\ncaf\udce9,0"),
            ("jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "caf\udce9"}'),
            ("txt", "one\ntwo\ncaf\udce9"),
        )
    ),
    ({"x.csv": 'text,label\n"",0\n" ",1\n'}, "all 2 rows have an empty text"),
    ({"x.csv": "text;label\na;1\n"}, r"x\.csv, line 1: no comma, but ';' in 'text;label'"),
    ({"x.csv": "text,label\na,1,2\n"}, r"x\.csv, line 2: 3 fields, but there are 2 columns"),
    ({"x.csv": 'text,label\n"a,1\n'}, r"x\.csv, line 2: not valid CSV: unexpected end of data"),
    ({"x.tsv": "text\tlabel\na\n"}, r"x\.tsv, line 2: 1 fields, but there are 2 columns"),
    ({"x.jsonl": '{"text": "a"}\n{"text"\n'}, r"x\.jsonl, line 2 is not JSON", LANGUAGE),
    ({"x.jsonl": "7\n"}, r"x\.jsonl, line 1 is not a JSON object", LANGUAGE),
    ({"x.jsonl": '{"text": 7}\n'}, r"line 1: column 'text' is not text: 7", LANGUAGE),
    ({"x.jsonl": '{"text": "a"}\n{"b": 1}\n'}, r"line 2: column 'text' is missing", LANGUAGE),
    ({"x.jsonl": '{"text": "a \\ud800"}\n{"text": "b"}\n'}, r"line 1: .* is not UTF-8", LANGUAGE),
    (
        {"x.jsonl": '{"text": "a", "label": 0}\n{"text": "b", "label": 1, "label": 0}\n'},
        r"x\.jsonl, line 2 is not JSON: the key 'label' occurs more than once",
    ),
    ({"x.json": '[["a", 0], {"text": "b", "text": "c", "label": 1}]'}, r"is not JSON: the key 'te"),
    *(
        ({f"x.{kind}": content}, rf"{place} is not JSON: the key 'role' occurs", LANGUAGE)
        for kind, content, place in (
            ("jsonl", '{"text": "a", "from": [{"role": 1, "role": 2}]}', r"x\.jsonl, line 1"),
            ("json", '[{"text": "a", "from": {"at": {"role": 1, "role": 2}}}]', r"x\.json"),
        )
    ),
    ({"x.json": '{"train": [["a", 0]]}'}, r"x\.json is not a JSON list of rows; .*each split"),
    ({"x.json": "[[1, 2, 3]]"}, r"row 1 must be a text, an object or \[text, label\]", LANGUAGE),
    ({"x.parquet": "PAR1"}, r"x\.parquet is not a readable parquet file", LANGUAGE),
    # Columns
    ({"x.csv": "text,text\na,b\n"}, r"x\.csv: column 'text' occurs more than once"),
    ({"x.csv": "body,label\na,0\n"}, r"column 'text' does not exist; the columns are body, label;"),
    ({"x.jsonl": '{"question": "a"}'}, r"are question; .*prompts .*task\.prompt_column", LANGUAGE),
    ({"x.csv": "text,topic\na,0\n"}, r"column 'label' .* does not exist; .* are text, topic"),
    ({"train.csv": GOOD, "dev.csv": "text\na\n"}, r"dev\.csv: column 'label' .* does not exist"),
    # Labels
    *(
        ({"x.csv": labels("0.5", f'"{wrong}"')}, rf"line 3: '{wrong}' .* is not a finite", SCORES)
        for wrong in ("good", "inf", "1,5", "1_000", "1e39", "-1e300")
    ),
    ({"x.csv": labels(0, 1, 99)}, r"x\.csv, line 4: label 99 is outside 0\.\.2"),
    ({"x.csv": labels(1, 2, 3)}, r"x\.csv, line 4: label 3 is outside 0\.\.2"),
    ({"x.csv": labels(0, -1, 1)}, r"x\.csv, line 3: label -1 is outside 0\.\.2"),
    ({"x.csv": labels(0, "cat", 1)}, r"mix numbers and words: '0' \(x\.csv, line 2\) and 'cat'"),
    ({"x.csv": labels(1, 1, 1)}, r"all labels in column 'label' are '1'; classification needs at"),
    ({"x.csv": labels("", "", "")}, r"column 'label' has no label in any row"),
    (
        {"x.jsonl": '{"text": "a", "label": "\\ud800x"}\n{"text": "b", "label": "y"}\n'},
        r"x\.jsonl, line 1: column 'label' is not UTF-8",
    ),
    (
        {"x.jsonl": '{"text": "a", "label": 0}\n{"text": "b", "label": [1]}\n'},
        r"line 2: label \[1\] in column 'label' is not a class",
    ),
    (
        {"x.jsonl": '{"text": "a", "label": 0}\n{"text": "b", "label": 0.5}\n'},
        r"line 2: label 0\.5 .* is not a class; .* task\.type: regression",
    ),
    ({"train.csv": GOOD, "dev.csv": labels(0, 7)}, r"dev\.csv, line 3: label 7 is outside 0\.\.1"),
    (
        {"train.csv": labels("negative", "positive"), "dev.csv": labels("postive")},
        r"dev\.csv, line 2: label 'postive' is not one of the 2 .* did you mean 'positive'\?",
    ),
    ({"train.csv": GOOD, "dev.csv": "text,label\na,\n"}, r"the validation split of .* has no labe"),
    # Keys
    ({"x.csv": GOOD}, r"column 'topic' \(task\.label_column\) does not", {"label_column": "topic"}),
    ({"train.csv": GOOD, "dev.csv": GOOD}, r"4, .* has 3 labelled rows", {"labelled_examples": 4}),
    ({"x.csv": GOOD}, r"task\.dataset_config: 'en' is for a data set of", {"dataset_config": "en"}),
    # Data sets of the Hub; tests/conftest.py sets HF_HUB_OFFLINE
    (
        {},
        r"Hub cannot be reached .*\(en\)",
        {"dataset": "someone/somedata", "dataset_config": "en"},
    ),
    ({}, r"the data set what is this\?", {"dataset": "what is this?"}),
]


@pytest.mark.parametrize(
    ("files", "message", "keys"),
    [(*case, {})[:3] for case in CASES],
    ids=[c[1][:40] for c in CASES],
)
def test_data_that_cannot_be_used_is_refused_with_the_reason(load, tmp_path, files, message, keys):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in files.items():
        # A byte that is no UTF-8 stands in the text as "\udc" and its digits.
        (folder / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    given = folder / next(iter(files)) if len(files) == 1 else folder

    with pytest.raises((ConfigError, DataError), match=message):
        load(**{"dataset": given, **keys})
