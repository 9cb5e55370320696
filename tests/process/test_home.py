"""Paths in the home folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.process.terminal import in_home


@pytest.mark.parametrize(
    ("text", "path"),
    [("~/model", "me/model"), ("model/~", "model/~"), ("~no-such-user/x", "~no-such-user/x")],
)
def test_the_home_folder_is_put_in_where_a_path_begins_with_it(text, path, monkeypatch):
    monkeypatch.setenv("HOME", "me")

    assert in_home(text) == Path(path)
