"""The text of a row of a table."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.data.tables import Record
from megakd.errors import DataError


def document_of(name: str, columns: Sequence[str], record: Record) -> str | None:
    """Return the document of a row, with a line per column; None if the row has no text.

    Args:
        name: name of the data in messages.
        columns: the columns of text; two columns (question, answer) make one document.
        record: the row.

    Raises:
        DataError: a value is missing or is not text.
    """
    texts = [text_of(name, column, record) for column in columns]
    # A blank document has no tokens.
    return "\n".join(texts) if any(text.strip() for text in texts) else None


def text_of(name: str, column: str, record: Record) -> str:
    """Return the text in a column of a row.

    Raises:
        DataError: the value is missing or is not text.
    """
    text = record.values.get(column)
    if not isinstance(text, str):
        problem = "is missing" if text is None else f"is not text: {text!r}"
        raise DataError(f"{name}, {record.place}: column {column!r} {problem}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}, {record.place}: column {column!r} is not UTF-8: it holds half of a "
            f"surrogate pair at character {error.start}"
        ) from error
    return text
