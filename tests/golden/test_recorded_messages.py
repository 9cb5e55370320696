"""The texts of the package, with errors and warnings, equal the recorded texts."""

from __future__ import annotations

from pathlib import Path

from recorded import check_recorded, sentences


def test_the_texts_of_the_package_are_as_recorded(repository: Path):
    """A changed text is shown by the change of its record."""
    check_recorded("texts", dict.fromkeys(sentences(repository / "megakd"), ""))
