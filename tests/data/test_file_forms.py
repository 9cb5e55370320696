"""Files as other programs write them: quotes, line ends, compression, names like patterns."""

from __future__ import annotations

import pyarrow as pa
import pytest

from megakd.data.files import matching_files


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
