"""Numbers of the encoded conversations of a split: the table at the start of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from megakd.contract.batch import IGNORE
from megakd.data.arrow import longest_of
from megakd.process.terminal import aligned_rows

logger = logging.getLogger(__name__)
KEYED = ("special", "ends", "lengths")
SWITCHES = ("enable_thinking", "thinking")
"""Arguments of chat templates that choose whether a model reasons."""
MOST_SHOWN = 400
"""Characters at each end of a long part of the first row that the log shows."""
HEADING = (
    *("rows of", "read", "encoded", "tokens", "that count", "share"),
    *("p50", "p95", "longest", "truncated", "dropped", "bad"),
)
LEARNED = ("train", "validation")
SETS = "sets"
"""Prefix of the evaluation sets among the names of rows: `sets/NAME`."""


@dataclass
class ChatCounts:
    """Numbers of conversations and tokens.

    rows, kept: conversations that were read, and encoded rows.
    tokens, targets: tokens of the encoded rows, and the tokens that count.
    truncated: rows that were cut at max_length.
    prompts: rows without an answer.
    too_long, long_prompt, nothing_counts, bad: rows that were left out because of
        `task.truncation: drop`, because their prompt fills max_length, because no token of their
        answer counts, and because they cannot be encoded (`task.bad_rows: drop`).
    lost_reasoning, lost_tools: rows in which the chat template leaves out the reasoning of an
        answer, or a tool of the column `tools`.
    empty_reasoning: rows in which the chat template writes reasoning without words into an answer.
    special: by the number of a special token, how many of the tokens that count it is.
    ends: by the number of a special token, how many rows with a whole answer it ends.
    lengths: by the number of tokens before a row is cut, how many rows have it. Documents, which
        are cut into rows without losing a token, are not counted.
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
    empty_reasoning: int = 0
    bad: int = 0
    special: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """The number of conversations that have no encoded row."""
        return self.too_long + self.long_prompt + self.nothing_counts

    def add(self, other: ChatCounts) -> None:
        for name, more in vars(other).items():
            here = getattr(self, name)
            if name in KEYED:
                here.update({number: here.get(number, 0) + n for number, n in more.items()})
            else:
                setattr(self, name, here + more)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> ChatCounts:
        """Return the numbers that `asdict` returned and JSON stored."""
        by_number = {k: {int(n): c for n, c in v.items()} for k, v in record.items() if k in KEYED}
        return ChatCounts(**{**record, **by_number})


CountsByName = dict[str, ChatCounts]
"""Numbers by the name of the rows: a split, or `split/source` of a mixture."""


def learned(counts: Mapping[str, ChatCounts] | None) -> list[ChatCounts]:
    """Return the numbers of the training rows, or of the held-out rows beside a stream."""
    # A stream is not encoded before the run, but its held-out rows are.
    splits = ([t for n, t in (counts or {}).items() if n.split("/")[0] == s] for s in LEARNED)
    return next(filter(None, splits), [])


def learned_ends(counts: Mapping[str, ChatCounts] | None) -> frozenset[int]:
    """Return the special tokens that end at least a tenth of the learned answers."""
    return frozenset(
        number
        for tally in learned(counts)
        for number, rows in tally.ends.items()
        if 10 * rows >= tally.kept - tally.prompts - tally.truncated
    )


def _say_counts(counts: Mapping[str, ChatCounts], template: str) -> None:
    logger.info("conversations:\n%s", "\n".join(table_lines(counts)))
    for name, tally in counts.items():
        for number, what in (
            (tally.long_prompt, "were left out because their prompt alone fills task.max_length"),
            (tally.too_long, "were left out because they are longer than task.max_length"),
            (tally.nothing_counts, "were left out because no token of them counts"),
            (tally.bad, "were left out because they cannot be encoded (task.bad_rows: drop)"),
        ):
            if number:
                logger.warning("%s: %d of %d rows %s", name, number, tally.rows, what)
        longer = tally.truncated + tally.too_long + tally.long_prompt
        if longer > 0.01 * sum(tally.lengths.values()):
            longest = longest_of(tally.lengths, 0.99)
            logger.warning(
                "%s: %d of %d rows are longer than task.max_length (%d of them are cut); 99 %% of "
                "the rows have at most %d tokens (task.max_length=%d keeps them whole)",
                *(name, longer, tally.rows, tally.truncated, longest, longest),
            )
        if tally.lost_reasoning:
            logger.warning(
                "%s: the chat template leaves out the reasoning of answers in %d of %d rows; use a "
                "template that keeps it, or set task.reasoning: strip to say that this is wanted",
                *(name, tally.lost_reasoning, tally.rows),
            )
        if tally.lost_tools:
            logger.warning(
                "%s: the chat template leaves out tools of the column 'tools' in %d of %d rows; "
                "set task.chat_template to a template that writes tools, or remove the column",
                *(name, tally.lost_tools, tally.rows),
            )
        if tally.empty_reasoning:
            key = next((key for key in SWITCHES if key in template), None)
            logger.warning(
                "%s: the chat template writes empty reasoning into the answers of %d of %d rows, "
                "so that the student learns not to reason; %s",
                *(name, tally.empty_reasoning, tally.rows),
                f"task.chat_template_kwargs: {{{key}: false}} moves it into the prompt"
                if key
                else "set task.chat_template to a template that leaves it out",
            )


def say_chat(
    rows: Mapping[str, Dataset], counts: CountsByName, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Log the table of encoded conversations and the first row with its counted parts marked."""
    _say_counts(counts, str(tokenizer.chat_template))
    name = next(iter(rows))
    row = rows[name][0]
    counted = [False, *(label != IGNORE for label in row["labels"][:-1])]
    parts: list[str] = []
    for does_count, group in groupby(
        zip(counted, row["input_ids"], strict=True), key=lambda pair: pair[0]
    ):
        text = cast("str", tokenizer.decode([token for _, token in group]))
        if len(text) > 2 * MOST_SHOWN:
            text = f"{text[:MOST_SHOWN]} … {text[-MOST_SHOWN:]}"
        parts.append(f"[[{text}]]" if does_count else text)
    logger.info("first row of %s, [[what counts]]: %s", name, "".join(parts))


def table_lines(counts: Mapping[str, ChatCounts]) -> list[str]:
    """Return the lines of the table: a heading, and a line for each name."""
    rows: list[Sequence[str]] = [HEADING]
    for name, tally in counts.items():
        numbers = (tally.rows, tally.kept, tally.tokens, tally.targets)
        share = tally.targets / tally.tokens if tally.tokens else 0.0
        lengths = (longest_of(tally.lengths, part) for part in (0.5, 0.95, 1.0))
        rest = (*lengths, tally.truncated, tally.dropped, tally.bad)
        shown = (*(f"{n:,}" for n in numbers), f"{share:.1%}", *(f"{n:,}" for n in rest))
        rows.append((name, *shown))
    return aligned_rows(rows)
