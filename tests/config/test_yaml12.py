"""YAML 1.2: each key once, plain values only."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.config.file import dump_yaml, parse_yaml
from megakd.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("010", 10),
        ("0x1F", 31),
        ("true", True),
        ("", None),
        ("on", "on"),
        ("7:1", "7:1"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-4'", "1e-4"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("{1: a, on: b}", {"1": "a", "on": "b"}),
    ],
    ids=repr,
)
def test_scalars_mean_what_yaml_1_2_says(text, value):
    parsed = parse_yaml(text, source="test")

    assert (type(parsed), parsed) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", 'line 3: the key "a" is given twice'),
        ("a:\n  b: 1\n  b: 1", 'line 3: the key "b" is given twice'),
        ("a: [1, 2", "line 1: while parsing a flow sequence expected ',' or ']'"),
        ("a:\n\t- 1", "line 2: while scanning for the next token found character '\\t'"),
        ("x: &x {a: 1}\ny: {<<: *x}", "line 2: merge keys (<<) are not part of YAML 1.2"),
        ("? [a]\n: 1", "line 1: a key must be text"),
        ("a: !!int x", "line 1: 'x' is not a number"),
        ("a: !!python/name:os.system x", "line 1: could not determine a constructor for the tag"),
        ("a: b\nc: \x07", "line 2: character #x0007 is not allowed in YAML"),
        ("a: 1\n---\nb: 1", "line 2: expected a single document"),
        ("a: *b", "line 1: found undefined alias 'b'"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_broken_yaml_is_refused_naming_the_line(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_yaml(text, source="run.yaml")


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(st.characters(codec="utf-8"), max_size=8)
        | st.sampled_from(["on", "1e-4", "7:1", "null", "0x1F", "<<", ".inf", "2024-01-01"])
        | st.sampled_from(["\x85", "a\u2028b", "\r"]),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("ab<=1~", max_size=3), inner)
        ),
        max_leaves=8,
    )
)
def test_what_is_written_is_read_back(tree):
    assert parse_yaml(dump_yaml(tree), source="test") == tree


def test_written_words_are_quoted_where_older_yaml_reads_them_otherwise():
    assert dump_yaml({"a": "on", "b": "7:1"}) == "a: 'on'\nb: '7:1'\n"
