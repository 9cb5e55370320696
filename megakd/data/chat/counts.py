"""Numbers of the encoded conversations of a split: the lines at the start of a run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from megakd.contract.batch import IGNORE
from megakd.data.arrow import longest_of

logger = logging.getLogger(__name__)
MOST_SHOWN = 400
"""Characters at each end of a long part of the first row that the log shows."""
LEARNED = ("train", "validation")
SETS = "sets"
"""Prefix of the evaluation sets among the names of rows: `sets/NAME`."""
BY_TEMPLATE = {
    "lost_reasoning": "lose the reasoning of their answers in the chat template; use a template "
    "that keeps it, or set task.reasoning: strip to say that this is intended",
    "empty_reasoning": "get empty reasoning in their answers from the chat template, so that the "
    "student learns not to reason; if the template knows enable_thinking, "
    "task.chat_template_kwargs: {enable_thinking: false} moves it into the prompt; else set "
    "task.chat_template to a template that leaves it out",
    "without_template": "are a prompt and a completion without the chat template of the tokenizer, "
    "in which the model will be asked; set task.as_messages: true to render them by it",
}
"""What a chat template does to rows, by the number of the rows, and what to do."""


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
    lost_reasoning: rows in which the chat template leaves out the reasoning of an answer.
    empty_reasoning: rows in which the chat template writes reasoning without words into an answer.
    without_template: prompts and answers as texts, although the tokenizer has a chat template.
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
    empty_reasoning: int = 0
    without_template: int = 0
    bad: int = 0
    special: Counter[int] = field(default_factory=Counter[int])
    ends: Counter[int] = field(default_factory=Counter[int])
    lengths: Counter[int] = field(default_factory=Counter[int])

    @property
    def reasons(self) -> str:
        """The numbers of the conversations that have no encoded row, by reason, as text."""
        return (
            f"the prompt of {self.long_prompt} fills task.max_length, {self.too_long} are longer, "
            f"in {self.nothing_counts} no token counts, {self.bad} cannot be encoded"
        )

    def add(self, other: ChatCounts) -> None:
        for name, more in vars(other).items():
            if isinstance(more, Counter):
                getattr(self, name).update(more)
            else:
                setattr(self, name, getattr(self, name) + more)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> ChatCounts:
        """Return the numbers that `asdict` returned and JSON stored."""
        keyed = {
            k: Counter({int(n): c for n, c in v.items()})
            for k, v in record.items()
            if isinstance(v, dict)
        }
        return ChatCounts(**{**record, **keyed})


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


def say_chat(
    rows: Mapping[str, Dataset], counts: CountsByName, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Log the numbers of each split, and the first row with its counted parts marked."""
    for name, tally in counts.items():
        lengths = [*tally.lengths.elements()]
        left_out = tally.long_prompt + tally.too_long + tally.nothing_counts + tally.bad
        logger.info(
            "%s: %d conversations, %d encoded rows with %d tokens, of which %.1f %% count; the "
            "longest has %d tokens, %d are truncated, %d dropped",
            *(name, tally.rows, tally.kept, tally.tokens),
            *(100 * tally.targets / max(1, tally.tokens), longest_of(lengths)),
            *(tally.truncated, left_out),
        )
        warnings = [(left_out, f"are left out: {tally.reasons}")]
        longer = tally.truncated + tally.too_long + tally.long_prompt
        if longer > 0.01 * len(lengths):
            most = longest_of(lengths, 0.99)
            what = f"are longer than task.max_length; task.max_length={most} keeps 99 % whole"
            warnings.append((longer, what))
        warnings += [(getattr(tally, key), what) for key, what in BY_TEMPLATE.items()]
        for number, what in warnings:
            if number:
                logger.warning("%s: %d of %d rows %s", name, number, tally.rows, what)
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
