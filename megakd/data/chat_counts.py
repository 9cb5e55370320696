"""Numbers of the encoded conversations of a split: the table at the start of a run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)
SETS = "sets"
"""Prefix of the evaluation sets among the names of rows: `sets/NAME`."""


@dataclass
class ChatCounts:
    """Numbers of conversations and tokens.

    rows: conversations that were read.
    kept: encoded rows.
    tokens, targets: tokens of the encoded rows, and the tokens that count.
    truncated: rows that were cut at max_length.
    too_long: rows that were left out because of `task.truncation: drop`.
    long_prompt: rows that were left out because their prompt fills max_length.
    nothing_counts: rows with an answer that were left out because no token counts.
    prompts: rows without an answer.
    lost_reasoning: rows in which the chat template leaves out the reasoning of an answer.
    lost_tools: rows in which the chat template leaves out a tool of the column `tools`.
    special: by the number of a special token, how many of the tokens that count it is.
    """

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    targets: int = 0
    truncated: int = 0
    too_long: int = 0
    long_prompt: int = 0
    nothing_counts: int = 0
    prompts: int = 0
    lost_reasoning: int = 0
    lost_tools: int = 0
    special: dict[int, int] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """The number of conversations that have no encoded row."""
        return self.too_long + self.long_prompt + self.nothing_counts

    def add(self, other: ChatCounts) -> None:
        """Add the numbers of further rows."""
        for entry in dataclasses.fields(self):
            if entry.name != "special":
                own = getattr(self, entry.name)
                setattr(self, entry.name, own + getattr(other, entry.name))
        for token, count in other.special.items():
            self.special[token] = self.special.get(token, 0) + count

    def to_record(self) -> dict[str, Any]:
        """Return the numbers as JSON can store them."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> ChatCounts:
        """Return the numbers that `to_record` returned and JSON stored."""
        special = {int(token): count for token, count in record["special"].items()}
        return ChatCounts(**{**record, "special": special})


CountsByName = dict[str, ChatCounts]
"""Numbers by the name of the rows: a split, or `split/source` of a mixture."""


def say_counts(counts: Mapping[str, ChatCounts]) -> None:
    """Log the table of the encoded conversations, and warn about what is probably a mistake."""
    logger.info("conversations:\n%s", "\n".join(table_lines(counts)))
    for name, own in counts.items():
        for number, what in (
            (own.long_prompt, "were left out because their prompt alone fills task.max_length"),
            (own.too_long, "were left out because they are longer than task.max_length"),
            (own.nothing_counts, "were left out because no token of them counts"),
        ):
            if number:
                logger.warning("%s: %d of %d rows %s", name, number, own.rows, what)
        if own.lost_reasoning:
            logger.warning(
                "%s: the chat template leaves out the reasoning of answers in %d of %d rows; use a "
                "template that keeps it, or set task.reasoning: strip to say that this is wanted",
                name,
                own.lost_reasoning,
                own.rows,
            )
        if own.lost_tools:
            logger.warning(
                "%s: the chat template leaves out tools of the column 'tools' in %d of %d rows; "
                "set task.chat_template to a template that writes tools, or remove the column",
                name,
                own.lost_tools,
                own.rows,
            )


def table_lines(counts: Mapping[str, ChatCounts]) -> list[str]:
    """Return the lines of the table: a heading, and a line for each name."""
    heading = (
        "rows of",
        "read",
        "encoded",
        "tokens",
        "that count",
        "share",
        "truncated",
        "dropped",
    )
    lines = [heading, *(_cells(name, own) for name, own in counts.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    ]


def _cells(name: str, own: ChatCounts) -> tuple[str, ...]:
    numbers = (own.rows, own.kept, own.tokens, own.targets)
    share = own.targets / own.tokens if own.tokens else 0.0
    return (
        name,
        *(f"{number:,}" for number in numbers),
        f"{share:.1%}",
        f"{own.truncated:,}",
        f"{own.dropped:,}",
    )
