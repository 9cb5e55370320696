"""Conversations as token numbers, with next tokens as labels where the next token counts.

A row of the result is one conversation, or its part up to an answer where the chat template
rewrites what was said before (see `ChatTemplate.render`), not packed. Columns: `input_ids` and
`labels`, lists of int32 (see `PackedRow`), and `prompt_length`, the number of tokens that a
generator continues: up to and including the generation prompt of the last answer. A document of a
mixture is cut into rows of `max_length` without losing a target; its prompt has a length of 0.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from megakd.config.task import TaskConfig
from megakd.data.arrow import PLACE, longest_of
from megakd.data.batch import IGNORE, ROUTE
from megakd.data.chat_template import ChatTemplate, Rendered, without_reasoning
from megakd.data.conversations import CONVERSATION, SOURCE, Conversation
from megakd.data.records import BadRows
from megakd.data.token_tables import document_ends, numbers_of, plain_encoding, special_tokens
from megakd.errors import DataError
from megakd.process.workers import in_processes, processes_for

logger = logging.getLogger(__name__)

MOST_SHOWN = 400
"""Characters at each end of a long part of the first row that the log shows."""

LEARNED = ("train", "validation")

SETS = "sets"
"""Prefix of the evaluation sets among the names of rows: `sets/NAME`."""

NOTICED = {
    "cut_off": "have an answer that was cut off (finish_reason: length), whose end is not learned",
    "lost_reasoning": "lose the reasoning of their answers in the chat template; use a template "
    "that keeps it, or set task.reasoning: strip to say that this is intended",
    "empty_reasoning": "get empty reasoning in their answers from the chat template, so that the "
    "student learns not to reason; if the template knows enable_thinking, "
    "task.chat_template_kwargs: {enable_thinking: false} moves it into the prompt; else set "
    "task.chat_template to a template that leaves it out",
    "begun": "have a last answer that does not go on from the chat template's generation prompt, "
    "in which reasoning begins or ends, so that the model is asked in another way than it learns; "
    "set enable_thinking in task.chat_template_kwargs, or task.reasoning, as the answers are",
    "without_template": "are a prompt and a completion without the chat template of the tokenizer, "
    "in which the model will be asked; set task.as_messages: true to render them by it",
}
"""What is unusual about rows, by the number of the rows, and what to do."""


@dataclass
class ChatCounts:
    """Numbers of conversations and tokens.

    rows, kept: conversations that were read, and encoded rows.
    rewritten, parts, part_tokens: conversations of which each answer, or some answers, have a text
        of their own, the texts besides the whole conversation, and their tokens.
    tokens, targets: tokens of the encoded rows, and the tokens that count.
    truncated: rows that were cut at max_length.
    prompts: rows without an answer.
    too_long, long_prompt, nothing_counts, bad: rows that were left out because of
        `task.truncation: drop`, because their prompt fills max_length, because no token of their
        answer counts, and because they cannot be encoded (`task.bad_rows: drop`).
    lost_reasoning: rows in which the chat template leaves out the reasoning of an answer.
    empty_reasoning: rows in which the chat template writes reasoning without words into an answer.
    without_template: prompts and answers as texts, although the tokenizer has a chat template.
    begun: rows whose last answer does not go on from the generation prompt of the template.
    cut_off: rows whose last answer was cut off before its end.
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
    begun: int = 0
    cut_off: int = 0
    bad: int = 0
    rewritten: int = 0
    parts: int = 0
    part_tokens: int = 0
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
            setattr(self, name, getattr(self, name) + more)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> ChatCounts:
        """Return the numbers that JSON stored."""
        keys = ("special", "ends", "lengths")
        keyed = {key: Counter({int(n): c for n, c in record[key].items()}) for key in keys}
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


def log_chat(
    rows: Mapping[str, Dataset], counts: CountsByName, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Log the numbers of each split, and the first row with its counted parts marked."""
    for name, tally in counts.items():
        lengths = [*tally.lengths.elements()]
        left_out = tally.long_prompt + tally.too_long + tally.nothing_counts + tally.bad
        longest = f"; the longest has {longest_of(lengths)} tokens" if lengths else ""
        logger.info(
            "%s: %d %s, %d encoded rows with %d tokens, of which %.1f %% count%s, %d are "
            "truncated, %d dropped",
            *(name, tally.rows, "conversations" if lengths else "documents"),
            *(tally.kept, tally.tokens, 100 * tally.targets / max(1, tally.tokens)),
            *(longest, tally.truncated, left_out),
        )
        warnings = [(left_out, f"are left out: {tally.reasons}")]
        longer = tally.truncated + tally.too_long + tally.long_prompt
        if longer > 0.01 * len(lengths):
            most = longest_of(lengths, 0.99)
            what = f"are longer than task.max_length; task.max_length={most} keeps 99 % whole"
            warnings.append((longer, what))
        warnings += [(getattr(tally, key), what) for key, what in NOTICED.items()]
        if tally.rewritten:
            logger.info(
                "%s: %d of %d conversations have %d further rows with %d tokens, which end with "
                "earlier answers: the chat template rewrites these when the conversation goes on, "
                "or task.train_on is each; task.train_on: last learns the last answer alone",
                *(name, tally.rewritten, tally.rows, tally.parts, tally.part_tokens),
            )
        for number, what in warnings:
            if number:
                texts = tally.rows + tally.parts
                logger.warning("%s: %d of %d rows %s", name, number, texts, what)
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


ROWS_AT_ONCE = 100

ROWS_OF_A_PROCESS = 2000
"""A process encodes at least this many conversations, about a second of work."""

PROMPT_LENGTH = "prompt_length"


_Pieces = tuple[NDArray[np.int32], NDArray[np.int64]]
"""[T] tokens of a text, and [T, 2] the first character of each and the character after its last."""


class ChatRow(NamedTuple):
    """One encoded row; see the module."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    prompt_length: int


class Tokens(NamedTuple):
    """The tokens of one conversation before it is cut to `max_length`.

    counts: whether each token counts.
    prompts: the numbers of tokens before each answer; a generator continues the last.
    """

    ids: NDArray[np.int32]
    counts: NDArray[np.bool_]
    prompts: list[int]


def tables_of_conversations(
    rows: Dataset,
    encoder: ChatEncoder,
    *,
    counts: CountsByName,
    beside_training: bool = False,
) -> Iterator[pa.Table]:
    """Yield tables of encoded conversations, and no table if no row is left.

    `counts` gets the numbers of the rows by their source, "" without, while the tables are read.
    """
    columns = {CONVERSATION, PLACE, SOURCE, ROUTE}.intersection(rows.column_names)
    needed = rows.select_columns(sorted(columns))
    starts = range(0, len(rows), ROWS_AT_ONCE)
    # Threads of a rank that trains hold locks: it must not be forked.
    processes = 1 if beside_training else processes_for(len(rows), each=ROWS_OF_A_PROCESS)

    def part(start: int) -> _EncodedPart:
        if processes > 1:  # this process is one of many, and a forked one must not use threads
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        batch = needed.select(range(start, min(start + ROWS_AT_ONCE, len(rows))))
        return _part(batch.with_format("arrow")[:], encoder)

    bad = encoder.bad
    for table, numbers, errors in in_processes(part, starts, processes):
        for error in errors:
            with bad:
                raise DataError(error)
        for source, tally in numbers.items():
            counts.setdefault(source, ChatCounts()).add(tally)
        if table is not None:
            yield table
    bad.finish()


_EncodedPart = tuple["pa.Table | None", "CountsByName", Sequence[str]]
"""Table, numbers of the rows, and errors of the rows that cannot be encoded."""


def _part(batch: pa.Table, encoder: ChatEncoder) -> _EncodedPart:
    columns: dict[str, list[str]] = {
        column: batch.column(column).to_pylist() for column in batch.column_names
    }
    nothing = [""] * len(batch)
    conversations = list(map(Conversation.from_json, columns[CONVERSATION]))
    made: list[ChatRow] = []
    routes: list[str] = []
    counts: CountsByName = {}
    encoder.bad = bad = BadRows(named=len(batch) + 1)  # keeps all errors, for the parent process
    encoded = encoder(conversations, columns[PLACE])
    named = columns.get(SOURCE, nothing), columns.get(ROUTE, nothing)
    for source, teacher, (rows, numbers) in zip(*named, encoded, strict=True):
        counts.setdefault(source, ChatCounts()).add(numbers)
        made += rows
        routes += [teacher] * len(rows)
    if not made:
        return None, counts, bad.errors
    ids, labels, lengths = map(list, zip(*made, strict=True))
    listed = pa.list_(pa.int32())
    arrays = {"input_ids": pa.array(ids, type=listed), "labels": pa.array(labels, type=listed)}
    arrays[PROMPT_LENGTH] = pa.array(lengths, type=pa.int32())
    if ROUTE in columns:
        arrays[ROUTE] = numbers_of(routes)
    return pa.table(arrays), counts, bad.errors


class ChatEncoder:
    """Encoder of conversations; without `bad`, one that cannot be encoded raises its error."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, *, bad: BadRows | None = None
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path} ({type(tokenizer).__name__}) cannot tell "
                "which characters its tokens stand for, which conversations need; use a tokenizer "
                "with tokenizer.json"
            )
        self._tokenizer, self._task = tokenizer, task
        self.bad = bad or BadRows(named=1)
        self._template: ChatTemplate | None = None
        self._ends = document_ends(tokenizer)
        added = cast("Any", tokenizer).get_added_vocab().values()
        self._special = np.array(sorted({*tokenizer.all_special_ids, *added}), dtype=np.int32)

    def __call__(
        self, conversations: Sequence[Conversation], places: Sequence[str]
    ) -> Iterator[tuple[list[ChatRow], ChatCounts]]:
        """Yield the rows of each conversation, and their numbers; errors name its place."""
        rendered = [self._rendered(c, p) for c, p in zip(conversations, places, strict=True)]
        pieces = self._pieces([text.text for texts in rendered for text in texts])
        for conversation, texts, place in zip(conversations, rendered, places, strict=True):
            parts = [next(pieces) for _ in texts]
            result = list[ChatRow](), ChatCounts(rows=1, bad=1)
            with self.bad:
                tokens = [self._tokens(t, p, place) for t, p in zip(texts, parts, strict=True)]
                if texts:
                    result = self._all_rows(conversation, tokens, texts)
            yield result

    def _all_rows(
        self, conversation: Conversation, tokens: Sequence[Tokens], texts: Sequence[Rendered]
    ) -> tuple[list[ChatRow], ChatCounts]:
        rows, counts = self._rows(conversation, tokens[-1], texts[-1])
        counts.rows, counts.rewritten = 1, int(len(texts) > 1)
        for earlier, text in zip(reversed(tokens[:-1]), reversed(texts[:-1]), strict=True):
            more, made = self._rows(conversation, earlier, text)
            made.parts, made.part_tokens = 1, made.tokens
            rows = more + rows
            counts.add(made)
        return rows, counts

    def _rendered(self, conversation: Conversation, place: str) -> list[Rendered]:
        if conversation.messages is not None:
            self._template = self._template or ChatTemplate(self._tokenizer, self._task)
            with self.bad:
                return self._template.render(conversation, where=place)
            return []
        prompt, answer = conversation.prompt, conversation.completion
        if answer is None:
            return [Rendered(prompt, [], [len(prompt)])]
        if self._task.reasoning == "strip":
            answer = without_reasoning(answer)
        text = prompt + answer
        noticed = ("cut_off",) * conversation.is_cut
        return [Rendered(text, [(len(prompt), len(text))], [len(prompt)], noticed)]

    def _tokens(self, text: Rendered, pieces: _Pieces, place: str) -> Tokens:
        (ids, offsets), starts = pieces, np.unique([*text.prompts, *(a for a, _ in text.answers)])
        before = np.searchsorted(offsets[:, 0], starts)  # the tokens before each start
        if (np.append(0, offsets[:, 1])[before] != starts).any():
            ids, offsets, before = self._cut(text.text, starts, ids, place)
        counts = np.zeros(len(ids), dtype=np.bool_)
        for begin, end in text.answers:
            is_whole = end == len(text.text)
            last = len(ids) if is_whole else np.searchsorted(offsets[:, 0], end)
            counts[before[np.searchsorted(starts, begin)] : last] = True
        return Tokens(ids, counts, before[np.searchsorted(starts, text.prompts)].tolist())

    def _pieces(self, texts: Sequence[str]) -> Iterator[_Pieces]:
        made = plain_encoding(texts, self._tokenizer, with_offsets=True)
        for ids, offsets in zip(made["input_ids"], made["offset_mapping"], strict=True):
            places = np.fromiter(chain.from_iterable(offsets), np.int64)
            yield np.array(ids, np.int32), places.reshape(-1, 2)

    def _cut(
        self, text: str, starts: NDArray[np.int64], whole: NDArray[np.int32], place: str
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        # A tokenizer may join the end of a prompt and the beginning of an answer, such as two line
        # breaks, in one token. A generator continues the tokens of the prompt alone.
        edges = [0, *starts[starts > 0].tolist(), len(text)]
        ids, offsets = zip(*self._pieces([text[a:b] for a, b in pairwise(edges)]), strict=True)
        before = np.cumsum([0, *map(len, ids)])[np.searchsorted(edges, starts)]
        offsets = np.concatenate([o + edge for o, edge in zip(offsets, edges, strict=False)])
        joined = np.concatenate(ids)
        decode = partial(self._tokenizer.decode, clean_up_tokenization_spaces=False)
        if decode(joined) != decode(whole):
            pairs = zip(starts.tolist(), before.tolist(), strict=True)
            cut = (start for start, n in pairs if not np.array_equal(whole[:n], joined[:n]))
            start = next(cut, starts[-1])
            shown = special_tokens(self._tokenizer).shown
            near = shown(text[:start])[-20:], shown(text[start:])[:20]
            raise DataError(
                f"{place}: the tokens of the prompt are not the first tokens of the whole text: "
                f"the tokenizer joins {near[0]!r} with {near[1]!r}; begin the answer without white "
                "space, or end the prompt without"
            )
        return joined, offsets, before

    def _rows(
        self, conversation: Conversation, tokens: Tokens, text: Rendered
    ) -> tuple[list[ChatRow], ChatCounts]:
        noticed: dict[str, Any] = dict.fromkeys(text.noticed, 1)
        made = ChatCounts(
            prompts=int(conversation.is_prompt),
            without_template=int(bool(conversation.prompt and self._tokenizer.chat_template)),
            **noticed,
        )
        if conversation.messages is None:
            before, after = self._ends
            after = [] if conversation.is_prompt or conversation.is_cut else after
            tokens = Tokens(
                np.concatenate([before, tokens.ids, after]).astype(np.int32),
                np.pad(tokens.counts, (len(before), len(after)), constant_values=(False, True)),
                [len(before) + n for n in tokens.prompts],
            )
        if conversation.messages is None and not conversation.prompt:
            # The label of a row's last token is in the next row.
            labels = np.append(tokens.ids[1:], np.int32(IGNORE))
            cuts = range(self._task.row_length, len(labels), self._task.row_length)
            parts = zip(np.split(tokens.ids, cuts), np.split(labels, cuts), strict=True)
            rows = [ChatRow(*part, 0) for part in parts if (part[1] != IGNORE).any()]
        else:
            made.lengths[len(tokens.ids)] = 1
            row = self._cut_row(conversation, tokens, made)
            rows = [] if row is None else [row]
        for row in rows:
            targets = row.labels[row.labels != IGNORE]
            made.kept += 1
            made.tokens += len(row.input_ids)
            made.targets += len(targets)
            ids, numbers = np.unique(targets[np.isin(targets, self._special)], return_counts=True)
            made.special.update(dict(zip(ids.tolist(), numbers.tolist(), strict=True)))
            if made.lengths and not made.truncated and np.isin(targets[-1:], self._special).any():
                made.ends[int(targets[-1])] = 1
        return rows, made

    def _cut_row(
        self, conversation: Conversation, tokens: Tokens, made: ChatCounts
    ) -> ChatRow | None:
        most, is_prompt = self._task.row_length, conversation.is_prompt
        if len(tokens.ids) > most and self._task.truncation == "drop":
            made.too_long += 1
            return None
        # An answer counts if at least its first token is in the row.
        prompts = [n for n in tokens.prompts if n <= most - (not is_prompt)]
        if not prompts:
            made.long_prompt += 1
            return None
        ids, counts = tokens.ids[:most], tokens.counts[:most]
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        labels[:-1] = np.where(counts[1:], ids[1:], IGNORE)
        if not is_prompt and (labels == IGNORE).all():
            made.nothing_counts += 1
            return None
        made.truncated += int(len(ids) < len(tokens.ids))
        return ChatRow(ids, labels, prompts[-1])
