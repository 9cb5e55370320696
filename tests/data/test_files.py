"""Local files of every format and form: rows, splits, columns, labels; and what is refused."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakd.data.files import matching_files
from megakd.data.readers import pieces, records_of
from megakd.errors import ConfigError, DataError

ROWS = [("one fine day", 0), ("two, she said", 1), ("three", 0), ("vier für alle", 1)]
QUESTIONS = {"why?\nso", "who?\nme"}


def everything(splits):
    return {(row["text"], row["label"]) for part in splits[:2] for row in part}


def texts_of(splits):
    return [*splits.train["text"], *splits.validation["text"]]


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Write contents by name, and return the only file or the folder of several."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / next(iter(files)) if len(files) == 1 else folder


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

    assert [len(part) for part in load(tmp_path)[:3]] == [4, 2, 2]


@pytest.mark.parametrize(
    ("kind", "split", "missing", "first"),
    [("parquet", "train", 0, 0), ("jsonl", "validation", 2, 0), ("csv", "train", 3, 1)],
)
def test_a_missing_shard_is_named(load, write_rows, kind, split, missing, first, tmp_path):
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


def test_an_empty_shard_is_passed_over_and_one_of_a_pattern_is_missed(load, write_rows, tmp_path):
    for number, rows in {0: [], 1: ROWS, 3: []}.items():
        write_rows(tmp_path / f"part-{number:05}-of-00004.jsonl", rows)

    some = load(type="mlm", train_files=str(tmp_path / "part-0000[01]*"))

    assert len(texts_of(some)) == len(ROWS)
    message = r"train_files: the shard part-00002-of-00004\.jsonl is miss"
    with pytest.raises(DataError, match=message):
        load(type="mlm", train_files=str(tmp_path / "part-*.jsonl"))


def test_words_as_labels_are_sorted_and_columns_may_be_named(load, write_rows, tmp_path):
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


@pytest.mark.parametrize(
    ("files", "keys", "texts"),
    [
        # a list of texts
        ({"x.json": '["one day", "the end"]'}, {}, {"one day", "the end"}),
        # two columns
        ({"x.csv": "q,a\nwhy?,so\nwho?,me\n ,\n"}, {"text_columns": ("q", "a")}, QUESTIONS),
        # a folder of texts, and a file that is hidden
        ({"b.txt": "b.\n\nB.\n", "a.txt": "a.\n", "._a.txt": "\x00"}, {}, {"a.", "b.", "B."}),
    ],
)
def test_documents_of_a_language_model(load, tmp_path, files, keys, texts):
    splits = load(write_files(tmp_path / "data", files), type="causal_lm", **keys)

    assert {*texts_of(splits)} == texts
    assert splits.train.column_names == ["text"]
    assert splits.metrics == ("perplexity",)


def test_a_text_with_its_own_validation_file_keeps_long_pieces(load, tmp_path):
    texts = {"train.txt": "A paragraph.\n\n" * 50, "validation.txt": "Another.\n\n" * 50}

    splits = load(write_files(tmp_path, texts), type="causal_lm")

    assert (len(splits.train), len(splits.validation)) == (1, 1)


@given(st.lists(st.text(alphabet="ab \n", max_size=30), max_size=20), st.integers(1, 60))
@settings(max_examples=40)
def test_pieces_hold_all_the_text_in_its_order(blocks, length):
    lines = "\n".join(blocks).splitlines(keepends=True)

    result = list(pieces(iter(lines), length))

    assert "".join("".join(text for _, text in result).split()) == "".join("".join(lines).split())
    assert [first for first, _ in result] == sorted({first for first, _ in result})
    assert all(text.strip() for _, text in result)


NUMBERS = (("0", "1"), [1, -100, 0, -100])
CODES = (["007", "10", "00", "10"], ("00", "007", "10"), [1, 2, 0, 2])


@pytest.mark.parametrize(
    ("kind", "labels", "names", "numbers"),
    [
        ("csv", ["1.0", "", "0.0", -100], *NUMBERS),  # as pandas writes them if some are missing
        ("csv", ["1", "NaN", "0", "nan"], *NUMBERS),
        ("jsonl", [1, None, 0, None], *NUMBERS),
        ("csv", *CODES),
        ("jsonl", *CODES),
    ],
)
def test_rows_may_have_no_label_and_numbers_with_leading_zeros_are_names(
    load, write_rows, tmp_path, kind, labels, names, numbers
):
    rows = list(zip("abcd", labels, strict=True))
    write_rows(tmp_path / f"train.{kind}", rows)
    write_rows(tmp_path / "dev.csv", rows if "00" in names else ROWS)

    splits = load(tmp_path)

    assert splits.train["label"][:] == numbers
    assert splits.label_names == names


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


def test_a_file_that_gets_the_ending_of_another_format_is_read_again(load, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text\n"a 1"\na 2\n')

    assert {*texts_of(load(path, type="mlm"))} == {"a 1", "a 2"}
    path = path.rename(tmp_path / "a.tsv")
    assert {*texts_of(load(path, type="mlm"))} == {'"a 1"', "a 2"}


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_test_rows_without_a_column_of_labels_are_not_scored(load, tmp_path, kind):
    rows = ",text,label\n0,a,0\n1,b,1\n2,c,1\n"  # pandas gives the column of its index no name
    files = {"train.csv": rows, "dev.csv": rows, "test.csv": ",text\n0,d\n1,e\n"}

    assert load(write_files(tmp_path, files), type=kind).test is None


LATER = {"huggingface": '{"info": {"features": {"text": {"_type": "KindOfALaterVersion"}}}}'}
TABLE = pa.table({"text": ["a"]})
LATIN_1 = pa.table({"text": pa.array([b"caf\xe9"]).view(pa.string())})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE.replace_schema_metadata(LATER), r"rows\.parquet is not a readable parquet .*Kind"),
        (TABLE.append_column("text", TABLE["text"]), "column 'text' occurs more than once"),
        (LATIN_1, r"rows\.parquet: text is not UTF-8"),
    ],
    ids=["a later version", "two columns of one name", "not UTF-8"],
)
def test_a_parquet_file_that_cannot_be_read_is_refused(load, tmp_path, table, message):
    pq.write_table(table, tmp_path / "rows.parquet")

    with pytest.raises(DataError, match=message):
        load(tmp_path / "rows.parquet", type="causal_lm")


def test_parquet_columns_that_are_no_text_and_no_label_have_no_value(tmp_path, load):
    more = pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))
    columns = {"text": ["a"], "label": [0], "messages": more}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")

    (record,) = records_of(tmp_path / "rows.parquet")
    assert record.values == {"text": "a", "label": 0}
    with pytest.raises(DataError, match=r"row 1.*'messages'"):  # not the texts, silently
        load(tmp_path / "rows.parquet", type="causal_lm")


FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(FIELD))
def test_csv_gives_back_what_was_written(write_rows, tmp_path, texts):
    texts = [*texts, "word " * 40_000]  # longer than Python reads by default
    path = write_rows(tmp_path / "x.csv", [(text, 1) for text in texts])

    assert [record.values["text"] for record in records_of(path)] == texts


@pytest.mark.parametrize(
    ("kind", "count", "line"),
    [
        ("classification", 6, "2 row(s) with an empty text, the first is line 6"),
        (
            "causal_lm",
            4,
            "2 row(s) with an empty text, the first is line 6; such rows are left o",
        ),
    ],
)
def test_empty_texts_are_counted_at_every_start_and_no_documents(
    load, write_rows, tmp_path, caplog, kind, count, line
):
    path = write_rows(tmp_path / "x.tsv", [*ROWS, (" ", 1), ("", 0)])

    for _ in range(2):  # the second time, the rows come from the cache
        caplog.clear()
        assert len(texts_of(load(path, type=kind))) == count
        assert f"{path}: {line}" in caplog.text


def test_bad_rows_of_texts_are_named_together_or_left_out(load, write_rows, tmp_path, caplog):
    path, held = (write_rows(tmp_path / f"{name}.jsonl", ROWS) for name in ("x", "held"))
    bad = ['{"text": 7, "label": 0}', '{"text": ', '{"text": "a", "label": 0.5}']
    path.write_text(path.read_text() + "\n".join(bad) + "\n")
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


def test_a_cause_with_other_values_in_each_row_is_told_once(load, tmp_path):
    rows = "".join(f'{{"text": "a", "label": 0.{n}5}}\n' for n in range(1, 6))
    (tmp_path / "x.jsonl").write_text(rows)

    with pytest.raises(DataError) as caught:
        load(train_files=str(tmp_path / "x.jsonl"))

    _, line = str(caught.value).splitlines()
    assert "line 1: label 0.15 in column 'label' is not a class" in line
    assert line.endswith(" (5 such rows: line 1, line 2, line 3 and 2 more)")


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('text, label\n"a, b", "yes"\n"c",  "no"\n', {"a, b", "c"}),
        ('"text", "label"\r\n"a, ""b""", "yes"\r\n"c\nd", "no"\r\n', {'a, "b"', "c\nd"}),
        ('label, text\nyes, "a, b"\nno, c\n', {"a, b", "c"}),
        ('text,label\n" ""a"" b",yes\n" c, ""d"", e",no\n', {' "a" b', ' c, "d", e'}),
    ],
)
def test_quotes_after_a_blank_are_no_part_of_a_field(load, tmp_path, content, texts):
    splits = load(write_files(tmp_path, {"train.csv": content, "dev.csv": content}))

    assert splits.label_names == ("no", "yes")
    assert {*splits.train["text"]} == texts


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "txt"])
@pytest.mark.parametrize("compression", ["gz", "zst", "bz2"])
def test_compressed_files_are_read_as_their_contents(load, write_rows, tmp_path, kind, compression):
    codec = {"gz": "gzip", "zst": "zstd"}.get(compression, compression)
    words = [f"text {n}" for n in range(9)]
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    packed.mkdir()
    for split in ("train-0-of-2", "train-1-of-2", "dev"):
        path = plain / f"{split}.{kind}"
        if kind == "txt":
            plain.mkdir(exist_ok=True)
            path.write_text("\n\n".join(words))
        else:
            write_rows(path, [(word,) for word in words], header=("text",))
        compressed = str(packed / f"{path.name}.{compression}")
        with pa.output_stream(compressed, compression=codec) as file:
            file.write(path.read_bytes())

    first, second = (load(folder, type="mlm") for folder in (plain, packed))

    assert second.train["text"][:] == first.train["text"][:]
    assert " ".join(second.train["text"]).count("text 8") == 2


def test_one_row_without_a_line_end_and_crlf_are_read(load, tmp_path):
    files = {"train.csv": 'text,label\r\n"a\rb",x\r\nc,y', "dev.json": '[["sep=;", "x"]]\r'}

    assert [*load(write_files(tmp_path, files)).train["text"]] == ["a\rb", "c"]


@pytest.mark.parametrize("pattern", ["runs[1]/*.csv", "runs[1]/**/*.csv", "./runs[1]/[ab].csv"])
def test_a_pattern_below_a_folder_named_like_one_finds_its_files(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    folder = write_files(tmp_path / "runs[1]", {"b.csv": "", "a.csv": ""})
    expected = [folder / "a.csv", folder / "b.csv"]

    relative = matching_files(pattern, "task.train_files")
    whole = matching_files(f"{tmp_path}/{pattern}", "task.train_files")

    assert whole == expected
    assert [path.resolve() for path in relative] == expected


GOOD = "text,label\na,0\nb,1\nc,0\n"
LINES = "".join(f'{{"text": "{word}", "label": "{word[0]}"}}\n' for word in ("a b", "c d", "a e"))
NO_UTF_8 = r"line 3: text is not UTF-8 \(byte 0xe9 at position \d+\)"
LANGUAGE, SCORES = {"type": "causal_lm"}, {"type": "regression"}


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
    ({"x.csv": b"text,label\nok,1\ncaf\xe9,0"}, rf"x\.csv, {NO_UTF_8}", LANGUAGE),
    ({"x.jsonl": b'"a"\n"b"\n"caf\xe9"'}, rf"x\.jsonl, {NO_UTF_8}", LANGUAGE),
    ({"x.txt": b"one\ntwo\ncaf\xe9"}, rf"x\.txt, {NO_UTF_8}", LANGUAGE),
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
    ({"x.jsonl": '{"text": "a", "text": "b"}'}, "line 1 is not JSON: the key 'text' occurs more"),
    ({"x.json": '[["a", 0], {"text": "b", "text": "c", "label": 1}]'}, r"is not JSON: the key 'te"),
    ({"x.jsonl": '{"from": [{"a": 1, "a": 2}]}'}, "line 1 is not JSON: the key 'a' occu", LANGUAGE),
    ({"x.json": '[{"from": {"at": {"a": 1, "a": 2}}}]'}, "is not JSON: the key 'a' occ", LANGUAGE),
    ({"x.json": '{"train": [["a", 0]]}'}, r"x\.json is not a JSON list of rows; .*each split"),
    ({"x.json": "[[1, 2, 3]]"}, r"row 1 must be a text, an object or \[text, label\]", LANGUAGE),
    ({"x.parquet": "PAR1"}, r"x\.parquet is not a readable parquet file", LANGUAGE),
    # Columns
    ({"x.csv": "text,text\na,b\n"}, r"x\.csv: column 'text' occurs more than once"),
    ({"x.csv": "body,label\na,0\n"}, r"column 'text' does not exist; the columns are body, label;"),
    ({"x.csv": "a good film,1\nb,0\n"}, r"columns are a good film, 1 \(no header line\?"),
    (
        {"x.tsv": "a good film\t1\nb\t0\n"},
        r"columns are a good film, 1 \(no header line\?",
        {"text_columns": ("text",)},
    ),
    (
        {"x.jsonl": '{"instruction": "a", "input": "", "output": "b"}'},
        r"instructions or questions with answers task\.as_messages: true",
        LANGUAGE,
    ),
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
    ({"x.jsonl": '{"text": "a", "label": "\\ud800x"}'}, "line 1: column 'label' is not UTF-8"),
    (
        {"x.jsonl": '{"text": "b", "label": {"a": 1}}'},
        r"line 1: label \{'a': 1\} in column .* not a",
    ),
    ({"x.jsonl": '{"text": "b", "label": 0.5}'}, r"label 0\.5 .* is not a class; .*pe: regression"),
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
    ({"x.csv": GOOD}, r"task\.splits: .* local path; remove the key", {"splits": {"train": "a"}}),
    (
        {"x.json": '["a"]'},
        r"x\.json is a json file, .* \.jsonl",
        {"type": "mlm", "streaming": True},
    ),
    # Files in another form
    *(
        ({name: content.encode(encoding)}, "line 1: text is UTF-16 or UTF-32; convert the file")
        for name, content in (("x.csv", "text,label\na,b\n"), ("x.jsonl", LINES))
        for encoding in ("utf-16-le", "utf-16-be", "utf-32-le")
    ),
    ({"x.csv": b"text,label\ra,b\rc,d\r"}, r"line 1: lines end with CR \(\\r\) alone; save the"),
    ({"x.tsv": b"text\tlabel\ra\tb\rc\td"}, r"line 1: lines end with CR \(\\r\) alone; save the"),
    ({"x.jsonl": LINES.replace("\n", "\r").encode()}, r"line 1: lines end with CR \(\\r\) alone"),
    ({"x.csv": b"\xef\xbb\xbfsep=;\r\ntext;label\r\na;b\r\n"}, "line 1: sep= is a line for Excel"),
    ({"x.csv": b'"sep=,"\ntext,label\na,b\n'}, "line 1: sep= is a line for Excel alone; remove"),
    ({"x.tsv": b"SEP=\t\ntext\tlabel\na\tb\n"}, "line 1: sep= is a line for Excel alone; remove"),
    (
        {"x.jsonl": '[{"text": "a"}]'},
        r"line 1 is not a JSON object: .* rows is named \.json",
    ),
    ({"x.ndjson": '[\n {\n  "text": "a"\n }\n]'}, r"list of rows is named \.json"),
    ({"x.json": LINES}, r"is not JSON: Extra data: .*each line is named \.jsonl"),
    ({"x.txt": LINES}, r"x\.txt, line 1: a row of JSON; name a file .* \.jsonl"),
    ({"x.jsonl.gz": b"\x1f\x8b no gzip"}, r"x\.jsonl\.gz cannot be read"),
    # Data sets of the Hub; tests/conftest.py sets HF_HUB_OFFLINE
    ({}, r'no GLUE task \'sst3\'; did you mean "sst2"\?', {"dataset": "glue/sst3"}),
    ({}, r'did you mean "sst2"\?', {"dataset": "glue/SST-2"}),
    ({}, r"type: must be regression for glue/stsb \(got class", {"dataset": "glue/stsb"}),
    ({}, r"reached .* nyu-mll/glue \(sst2\), .* task\.train_files", {"dataset": "glue/sst2"}),
    (
        {},
        r"Hub cannot be reached .*\(en\)",
        {"dataset": "someone/somedata", "dataset_config": "en"},
    ),
    ({}, r"the data set what is this\?", {"dataset": "what is this?"}),
]


@pytest.mark.parametrize(("files", "message", "keys"), [(*case, {})[:3] for case in CASES])
def test_data_that_cannot_be_used_is_refused_with_the_reason(load, tmp_path, files, message, keys):
    dataset = write_files(tmp_path / "data", files)

    with pytest.raises((ConfigError, DataError), match=message):
        load(**{"dataset": dataset, **keys})
