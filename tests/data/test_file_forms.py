"""Files as other programs write them: read, or refused with what to change."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from megakd.data.files import matching_files
from megakd.errors import DataError

LINES = "".join(f'{{"text": "{word}", "label": "{word[0]}"}}\n' for word in ("a b", "c d", "a e"))
LIST = json.dumps([json.loads(line) for line in LINES.splitlines()])


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
    for name in ("train", "dev"):
        (tmp_path / f"{name}.csv").write_text(content, newline="")

    splits = load(tmp_path)

    assert splits.label_names == ("no", "yes")
    assert {*splits.train["text"]} == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *(
            (name, content.encode(encoding), "line 1: text is UTF-16 or UTF-32; convert the file")
            for name, content in (("x.csv", "text,label\na,b\n"), ("x.jsonl", LINES))
            for encoding in ("utf-16-le", "utf-16-be", "utf-32-le")
        ),
        ("x.csv", b"text,label\ra,b\rc,d\r", r"line 1: lines end with CR \(\\r\) alone; save the"),
        ("x.tsv", b"text\tlabel\ra\tb\rc\td", r"line 1: lines end with CR \(\\r\) alone; save the"),
        ("x.jsonl", LINES.replace("\n", "\r").encode(), r"line 1: lines end with CR \(\\r\) alone"),
        ("x.csv", b"\xef\xbb\xbfsep=;\r\ntext;label\r\na;b\r\n", "line 1: sep= is a line for Exce"),
        ("x.csv", b'"sep=,"\ntext,label\na,b\n', "line 1: sep= is a line for Excel alone; remove"),
        ("x.tsv", b"SEP=\t\ntext\tlabel\na\tb\n", "line 1: sep= is a line for Excel alone; remove"),
        ("x.jsonl", LIST.encode(), r"line 1 is not a JSON object: .* rows is named \.json"),
        ("x.ndjson", json.dumps(json.loads(LIST), indent=1).encode(), r"list of rows is named \.j"),
        ("x.json", LINES.encode(), r"is not JSON: Extra data: .*each line is named \.jsonl"),
        ("x.txt", LINES.encode(), r"x\.txt, line 1: a row of JSON; name a file .* \.jsonl"),
    ],
)
def test_a_file_in_another_form_is_refused_with_what_to_change(
    load, tmp_path, name, content, message
):
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(DataError, match=message):
        load(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "txt"])
@pytest.mark.parametrize("compression", ["gz", "zst", "bz2"])
def test_compressed_files_are_read_as_their_contents(load, write_rows, tmp_path, kind, compression):
    codec = {"gz": "gzip", "zst": "zstd"}.get(compression, compression)
    words = [f"text {n}" for n in range(9)]
    for split in ("train-0-of-2", "train-1-of-2", "dev"):
        plain = tmp_path / f"{split}.{kind}"
        if kind == "txt":
            plain.write_text("\n\n".join(words))
        else:
            write_rows(plain, [(word,) for word in words], header=("text",))
        with pa.output_stream(
            str(tmp_path / f"{plain.name}.{compression}"), compression=codec
        ) as f:
            f.write(plain.read_bytes())
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    for path in [*tmp_path.iterdir()]:
        folder = plain if path.suffix == f".{kind}" else packed
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)

    first, second = (load(folder, type="mlm") for folder in (plain, packed))

    assert second.train["text"][:] == first.train["text"][:]
    assert " ".join(second.train["text"]).count("text 8") == 2


def test_a_broken_compressed_file_is_refused(load, tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(b"\x1f\x8b no gzip")

    with pytest.raises(DataError, match=r"x\.jsonl\.gz cannot be read"):
        load(tmp_path / "x.jsonl.gz")


def test_one_row_without_a_line_end_and_crlf_are_read(load, tmp_path):
    (tmp_path / "train.csv").write_bytes(b"text,label\r\na\rb,x\r\nc,y".replace(b"a\rb", b'"a\rb"'))
    (tmp_path / "dev.json").write_text('[{"text": "sep=;", "label": "x"}]\r')

    assert [*load(tmp_path).train["text"]] == ["a\rb", "c"]


@pytest.mark.parametrize("pattern", ["runs[1]/*.csv", "runs[1]/**/*.csv", "./runs[1]/[ab].csv"])
def test_a_pattern_below_a_folder_whose_name_looks_like_one_finds_its_files(
    tmp_path, monkeypatch, pattern
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs[1]"
    folder.mkdir()
    for name in ("b.csv", "a.csv"):
        (folder / name).touch()
    expected = [folder / "a.csv", folder / "b.csv"]

    relative = matching_files(pattern, "task.train_files")
    whole = matching_files(f"{tmp_path}/{pattern}", "task.train_files")

    assert whole == expected
    assert [path.resolve() for path in relative] == expected
