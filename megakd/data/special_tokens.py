"""Special tokens whose strings occur in texts: there they are text, and no tokens.

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
from collections.abc import Collection, Mapping
from functools import lru_cache, partial
from typing import Any, TypeVar, cast

import pyarrow.compute
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from megakd.data.arrow import arrow_batches, remembered_of_rows
from megakd.data.chat.conversations import CONVERSATION

T = TypeVar("T")
logger = logging.getLogger(__name__)
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
        count = partial(_counts_of, rows.select_columns(sorted(texts)), _one_of(names))
        some, counts = remembered_of_rows(rows, ("special", sorted(names)), count)
        if some:
            listed = ", ".join(f"{token} {n} times" for token, n in counts[:_MOST_NAMED])
            logger.warning(
                "%s: %d of %d rows hold strings of special tokens (%s%s), which are read as text; "
                "give texts that are written with a chat template as messages",
                *(name, some, len(rows), listed, ", …" if len(counts) > _MOST_NAMED else ""),
            )


def _counts_of(rows: Dataset, pattern: re.Pattern[str]) -> tuple[int, list[tuple[str, int]]]:
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
