"""Conversations on disk: the rows of a table in one form, written once per content."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from datasets import Dataset, Features, Value

from megakd.contract.routes import ROUTE
from megakd.data.bad_rows import BadRows, BlankRows
from megakd.data.cache import PLACE, cached_folder, key_of, read_rows, write_rows
from megakd.data.chat.rows import CONVERSATION, SOURCE, VERSION, conversation_of
from megakd.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megakd.data.chat.rows import ChatColumns
    from megakd.data.routes import RowTeacher
    from megakd.data.tables import Table


def conversation_rows(
    table: Table,
    columns: ChatColumns,
    *,
    cache_dir: Path,
    bad_rows: Literal["error", "drop"] = "error",
    source: str | None = None,
    teacher: RowTeacher | None = None,
) -> Dataset:
    """Return the rows of a table with the columns of `chat.rows`, memory-mapped.

    Args:
        table: the table.
        columns: the columns to read.
        cache_dir: folder in which the rows are kept, by a hash of their content.
        bad_rows: see `task.bad_rows`.
        source: the source of a mixture, for the column `source`; None: no such column.
        teacher: where the teachers of the rows come from, for the column `route`; None: no column.

    Raises:
        DataError: rows are no conversations, or name no teacher; or no row has text.
    """
    name = Path(table.name).name
    key = key_of("chat", VERSION, table.digest, columns, name, source, *(teacher or ()))
    if bad_rows == "drop":
        key = key_of(key, bad_rows)
    further = {SOURCE: source, ROUTE: teacher}
    names = ("text", CONVERSATION, PLACE, *(n for n, value in further.items() if value is not None))

    def fill(fresh: Path) -> None:
        blank = BlankRows(bad=BadRows(bad_rows))
        features = Features({column: Value("string") for column in names})
        rows = _rows(table, columns, blank, source=source, teacher=teacher)
        write_rows(rows, features, fresh / "rows.arrow")
        blank.write(fresh)

    folder = cached_folder(cache_dir / "rows" / key[:32], fill)
    rows = read_rows(folder / "rows.arrow")
    if len(rows) == 0:
        raise DataError(f"{table.name} has no rows with text")
    BlankRows.tell(folder, table.name, rows=len(rows), are_kept=False)
    return rows


def _rows(
    table: Table,
    columns: ChatColumns,
    blank: BlankRows,
    *,
    source: str | None,
    teacher: RowTeacher | None,
) -> Iterator[dict[str, object]]:
    """Yield the rows of a table, and count the rows without text and the bad rows in `blank`."""
    own = {} if source is None else {SOURCE: source}
    for record in table.records():
        with blank.bad:
            conversation = conversation_of(table.name, columns, record)
            if conversation is None:
                blank.add(record)
                continue
            place = f"{Path(table.name).name}, {record.place}"
            texts = {"text": conversation.text, CONVERSATION: conversation.to_json(), PLACE: place}
            route = {} if teacher is None else {ROUTE: teacher.of(table, record)}
            yield {**texts, **own, **route}
