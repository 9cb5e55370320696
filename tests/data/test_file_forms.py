"""Files as other programs write them: read, or refused with what to change."""

from __future__ import annotations

import pytest


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
