"""Rows of text as arrow tables of token numbers, a batch at a time, and special tokens as text.

A row of mlm is a window of one text. A row of causal_lm is packed: documents are concatenated, and
a document that does not fit continues in the next row. For models that cannot keep documents apart,
it is a window of one document (see `models.packing`). Positions restart at 0 at the start of every
document and of every row. Decoders of transformers read the restarts as document boundaries and
prevent attention to other documents. This requires that no attention mask and no cache is given
(`use_cache=False`): with a cache, decoders ignore the restarts.

A text that holds `<|im_end|>` or `[MASK]` would otherwise end a turn or ask for a word. A fast
tokenizer reads texts with another string in the place of each special token: a mark, which texts do
not hold. A chat template writes the special tokens of its own, which become marks afterwards.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerBase

from megakd.config.task import LANGUAGE_TASKS, TaskConfig
from megakd.data.arrow import TEXTS_AT_ONCE, arrow_batches, column_of, remembered_of_rows
from megakd.data.batch import IGNORE, ROUTE, teacher_number
from megakd.data.conversations import CONVERSATION
from megakd.errors import DataError

T = TypeVar("T")

logger = logging.getLogger(__name__)

_IDS = pa.list_(pa.int32())
CHARACTERS_AT_ONCE = 4_000_000
"""About the most characters of a call of the tokenizer."""


def check_room_for_text(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> None:
    """Raise if the tokenizer's special tokens fill the rows of a task."""
    if task.type == "causal_lm":
        return
    is_pair = "text_pair" in rows.column_names
    special = tokenizer.num_special_tokens_to_add(pair=is_pair)
    if task.row_length <= special:
        raise DataError(
            f"task.max_length is {task.row_length}, but the tokenizer adds {special} special "
            f"tokens to every {'pair' if is_pair else 'text'}, which leaves no room for text; "
            f"raise task.max_length above {special}"
        )


def tables_of_texts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, *, packed: bool = True
) -> Iterator[pa.Table]:
    """Yield tables of encoded rows, and no table if there are no tokens."""
    if task.type not in LANGUAGE_TASKS:
        return _text_tables(rows, tokenizer, task)
    if ROUTE not in rows.column_names:
        return _language_tables(rows, tokenizer, task, packed=packed)
    # A packed row and a window have one teacher, so the texts of each teacher are packed apart.
    names = column_of(rows, ROUTE)
    return (
        table.append_column(ROUTE, numbers_of([name] * len(table)))
        for name in np.unique(names).tolist()
        for table in _language_tables(
            rows.select(np.flatnonzero(names == name)), tokenizer, task, packed=packed
        )
    )


def numbers_of(names: Sequence[str]) -> Any:
    """Return the numbers of teachers as an arrow array."""
    return pa.array(list(map(teacher_number, names)), type=pa.int64())


def _text_tables(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> Iterator[pa.Table]:
    has_pair = "text_pair" in rows.column_names
    label_type = pa.float32() if task.type == "regression" else pa.int64()
    columns = ["input_ids"]
    if has_pair and "token_type_ids" in tokenizer.model_input_names:
        columns.append("token_type_ids")
    for batch in arrow_batches(rows, TEXTS_AT_ONCE):
        encoded = special_tokens(tokenizer).reader(
            batch.column("text").to_pylist(),
            batch.column("text_pair").to_pylist() if has_pair else None,
            truncation=True,
            max_length=task.row_length,
            return_token_type_ids="token_type_ids" in columns,
            return_attention_mask=False,
        )
        made = {name: pa.array(encoded[name], type=_IDS) for name in columns}
        labels = batch.column("label").combine_chunks()
        is_set = pa.types.is_fixed_size_list(labels.type)  # several labels: 0 or 1 by class
        made["label"] = labels if is_set else labels.cast(label_type)
        if ROUTE in batch.column_names:
            made[ROUTE] = numbers_of(batch.column(ROUTE).to_pylist())
        yield pa.table(made)


def _language_tables(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, *, packed: bool
) -> Iterator[pa.Table]:
    length, texts = task.row_length, _texts(rows, tokenizer)
    if task.type == "causal_lm":
        prefix, suffix = document_ends(tokenizer)
        documents = (prefix + ids + suffix for ids in texts)
        made = pack(documents, length) if packed else single_documents(documents, length)
        return tables_of_lists(made, PackedRow._fields)
    prefix, suffix = frame(tokenizer)
    room = length - len(prefix) - len(suffix)
    made = (([*prefix, *part, *suffix],) for ids in texts for part in windows(ids, room))
    return tables_of_lists(made, ("input_ids",))


def tables_of_lists(rows: Iterable[tuple[Any, ...]], names: Sequence[str]) -> Iterator[pa.Table]:
    """Yield tables of rows in which every column is a list of token numbers."""
    rows = iter(rows)
    while batch := list(islice(rows, TEXTS_AT_ONCE)):
        columns = zip(names, zip(*batch, strict=True), strict=True)
        yield pa.table({name: pa.array(list(arrays), type=_IDS) for name, arrays in columns})


def _texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the tokens of every text that is not empty."""
    # The encoding of a text takes a hundred times its memory, and a row may be a book.
    for batch in arrow_batches(rows, TEXTS_AT_ONCE):
        texts: list[str] = batch.column("text").to_pylist()
        sizes = np.array([len(text) for text in texts])
        calls = (np.cumsum(sizes) - sizes) // CHARACTERS_AT_ONCE
        for _, part in groupby(zip(calls, texts, strict=True), key=itemgetter(0)):
            ids = plain_encoding([text for _, text in part], tokenizer)["input_ids"]
            yield from filter(None, ids)


def plain_encoding(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, with_offsets: bool = False
) -> BatchEncoding:
    """Return the encoding of whole texts, without special tokens.

    Special tokens whose strings are in the texts are text; see `SpecialTokens` for templates.
    """
    return special_tokens(tokenizer).reader(
        list(texts),
        add_special_tokens=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=with_offsets,
        verbose=False,
    )


def document_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after a document, which always ends with eos."""
    prefix, suffix = frame(tokenizer)
    eos = tokenizer.eos_token_id
    if eos is not None and suffix[-1:] != [eos]:
        suffix = [*suffix, eos]
    return prefix, suffix


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer adds before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]


class PackedRow(NamedTuple):
    """One row, int32; the last row of a data set is shorter than the others.

    input_ids: [T] tokens.
    position_ids: [T] counted from the start of the document, or of the row if later.
    labels: [T] the next token of the same document, even if the next token is in the next row;
        -100 at the end of a document. Every token except the first of a document is a target
        exactly once.
    """

    input_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


def pack(documents: Iterable[ArrayLike], length: int) -> Iterator[PackedRow]:
    """Yield documents packed in their order: full rows, then a shorter row with the rest.

    A document that does not fit continues in the next row.
    """
    if length < 1:
        raise ValueError(f"a packed row has at least 1 token, got length {length}")
    row, used = np.empty((3, length), dtype=np.int32), 0
    for document in documents:
        ids = np.asarray(document, dtype=np.int32)
        labels = np.append(ids[1:], np.int32(IGNORE))
        start = 0
        while start < len(ids):
            count = min(len(ids) - start, length - used)
            part = slice(start, start + count)
            row[:, used : used + count] = ids[part], np.arange(count), labels[part]
            used, start = used + count, start + count
            if used == length:
                yield PackedRow(*row)
                row, used = np.empty_like(row), 0
    if used:
        yield PackedRow(*row[:, :used])


def single_documents(documents: Iterable[ArrayLike], length: int) -> Iterator[PackedRow]:
    """Yield rows of one document, or of a window of a document of more than `length` tokens.

    A document of one token, which has no target, is left out.
    """
    for document in documents:
        ids = np.asarray(document, dtype=np.int32)
        labels = np.append(ids[1:], np.int32(IGNORE))
        for window in windows(range(len(ids)), length) if len(ids) > 1 else ():
            part = np.array(window)
            yield PackedRow(ids[part], np.arange(len(part), dtype=np.int32), labels[part])


def windows(ids: Sequence[int], room: int) -> Iterator[Sequence[int]]:
    """Cut a text into as few windows as possible, whose lengths differ by at most 1.

    A short last window would leave its masked tokens without context.
    """
    if room < 1:
        raise ValueError(f"a window has at least 1 token, got room {room}")
    count = -(-len(ids) // room)
    for number in range(count):
        yield ids[number * len(ids) // count : (number + 1) * len(ids) // count]


CONTROL = re.compile(r"<[|\uff5c].+[|\uff5c]>")
"""Tokens that are special by their form; some tokenizers, such as DeepSeek's, do not say so."""

REASONING_MARKS = ("<think>", "</think>")
"""Strings that stay tokens in answers: reasoning is a part of what is learned."""

_ROWS_AT_ONCE = 10_000

_MOST_NAMED = 5


class SpecialTokens:
    """The special tokens of a tokenizer as strings, and a tokenizer that reads them as text.

    reader: encodes texts in which `swapped` has replaced the special tokens of a template. It has
        the token numbers of the tokenizer, and serves for nothing else.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder.values()
        declared = (t.content for t in added if t.special or CONTROL.fullmatch(t.content))
        names = {*map(str, tokenizer.all_special_tokens), *declared}
        self.reader: Any = copy.copy(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:  # without numbers of characters, which conversations need
            self.reader.split_special_tokens, marks = True, dict[str, str]()
        else:
            tree = json.loads(backend.to_str())
            # Some tokenizers pad with "!" or end with a line break: these are pieces of any text.
            merges = tree["model"].get("merges") or ()
            joined = {"".join(m.split(" ", 1) if isinstance(m, str) else m) for m in merges}
            names -= {name for name in names if len(name) == 1 or name.isspace() or name in joined}
            # A sign at each end, so that no mark is a part of another and none is a word.
            marks = {name: f"⸨⟦{number}⟧⸩" for number, name in enumerate(sorted(names))}
            self.reader._tokenizer = _renamed(tree, marks)  # noqa: SLF001  (no public way)
            self.reader.split_special_tokens = False
        self.names = sorted(names, key=len, reverse=True)
        self._names = {mark: name for name, mark in marks.items()}
        self._other = marks | self._names
        self._both = _one_of(self._other)

    def swapped(self, text: str) -> str:
        """Return a text with a mark for each special token, and a special token for each mark."""
        return self._both.sub(lambda match: self._other[match[0]], text)

    def shown(self, text: str) -> str:
        """Return a text with the names of all special tokens, for messages."""
        return self._both.sub(lambda match: self._names.get(match[0], match[0]), text)

    def end_of_last(self, text: str) -> int:
        """Return the number of characters up to the end of the last special token; 0 without."""
        return max((text.rfind(name) + len(name) for name in self.names if name in text), default=0)

    def hidden(self, value: T, *, leave: Collection[str] = ()) -> T:
        """Return the value with `swapped` texts in all lists and objects.

        A template writes a value as it is, so that swapping its text again gives marks for the
        special tokens of the template alone. The strings of `leave` stay tokens.
        """
        hidden: Any = value
        if isinstance(value, str) and self._both.search(value):
            parts = re.split(f"({_one_of(leave).pattern})", value)
            hidden = "".join(part if part in leave else self.swapped(part) for part in parts)
        elif isinstance(value, Mapping):
            hidden = {key: self.hidden(each, leave=leave) for key, each in value.items()}
        elif isinstance(value, list):
            hidden = [self.hidden(each, leave=leave) for each in value]
        return hidden

    def say(self, rows: Dataset, *, name: str) -> None:
        """Warn of the rows whose texts hold the strings of special tokens."""
        names, texts = {*self.names}, {"text", "text_pair"}.intersection(rows.column_names)
        if CONVERSATION in rows.column_names:
            names, texts = names.difference(REASONING_MARKS), {CONVERSATION}
        count = partial(_matches, rows.select_columns(sorted(texts)), _one_of(names))
        some, counts = remembered_of_rows(rows, ("special", sorted(names)), count)
        if some:
            listed = ", ".join(f"{token} {n} times" for token, n in counts[:_MOST_NAMED])
            logger.warning(
                "%s: %d of %d rows hold strings of special tokens (%s%s), which are read as text; "
                "give texts that are written with a chat template as messages",
                *(name, some, len(rows), listed, ", …" if len(counts) > _MOST_NAMED else ""),
            )


def _matches(rows: Dataset, pattern: re.Pattern[str]) -> tuple[int, list[tuple[str, int]]]:
    """Return the number of rows that match, and the matches with their numbers."""
    counts, some, arrow = Counter[str](), 0, cast("Any", pyarrow.compute)
    for table in arrow_batches(rows, _ROWS_AT_ONCE):
        joined = arrow.binary_join_element_wise(*cast("Any", table).columns, "\n")
        found = joined.filter(arrow.match_substring_regex(joined, pattern.pattern)).to_pylist()
        some += len(found)
        counts.update(name for text in found for name in pattern.findall(text))
    return some, counts.most_common()


@lru_cache(maxsize=4)  # a run has two vocabularies at most, and evaluation may add another
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Return the special tokens of a tokenizer, to which no token is added afterwards."""
    return SpecialTokens(tokenizer)


def _one_of(strings: Collection[str]) -> re.Pattern[str]:
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"[^\s\S]")


def _renamed(tree: dict[str, Any], names: Mapping[str, str]) -> Tokenizer:
    """Return the tokenizer with other strings for the same token numbers."""
    model = tree["model"]
    for token in tree["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): n for name, n in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    renamed = Tokenizer.from_str(json.dumps(tree))
    renamed.no_truncation()
    renamed.no_padding()
    return renamed
