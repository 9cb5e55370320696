"""Texts as token numbers: encoded once, memory-mapped from disk."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from megakd.config.task import MixtureSource, TaskConfig
from megakd.data.arrow import key_of, read_rows, rows_key, write_tables
from megakd.data.chat_tokens import (
    SETS,
    ChatCounts,
    ChatEncoder,
    CountsByName,
    log_chat,
    tables_of_conversations,
)
from megakd.data.records import BadRows
from megakd.data.rows import RowKind, StreamedRows, is_labelled
from megakd.data.splits import Splits
from megakd.data.token_tables import check_room_for_text, special_tokens, tables_of_texts
from megakd.errors import DataError
from megakd.process.files import sha256_of, write_json
from megakd.process.seals import files_of, whole_folder

logger = logging.getLogger(__name__)
ROWS, COUNTS = "rows.arrow", "counts.json"
MANY_TIMES = 10
"""A source that an epoch reads more often than this is worth a warning."""
NOT_EXPORTED = ("is_local", "local_files_only")
"""How transformers read a tokenizer's files on this machine, which it saves with them."""
READ_ALIKE = ("BertTokenizer", "RobertaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer")
"""Classes that transformers 4 has, and that leave there what tokenizer.json says."""
# Part of every key: increase this number when the encoded rows would differ.
VERSION = 5


class Encoded(NamedTuple):
    """The splits as token numbers, memory-mapped.

    Columns for classification and regression: `input_ids`, `label`, and for pairs `token_type_ids`
    if the tokenizer returns them. For mlm: `input_ids`, with a row per window of a text (see
    `token_tables`). For causal_lm: `input_ids`, `position_ids` and `labels` (see `PackedRow`, also
    for rows that are not packed), or for conversations `input_ids`, `labels` and `prompt_length`
    (see `chat_tokens`). Rows that name their teacher also have its number in `route` (see
    `data.batch.teacher_number`).

    tokens_per_row: mean number of tokens of a training row, or with a stream of a validation row,
        without padding.
    stream: the training rows with `task.streaming`; `train` is then empty.
    evaluation_sets: further rows to score, by name.
    chat: the numbers of the conversations by split, and by `sets/NAME` for the evaluation sets;
        None for other rows.
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    tokens_per_row: float
    evaluation_sets: Mapping[str, Dataset] = MappingProxyType({})
    stream: StreamedRows | None = None
    chat: Mapping[str, ChatCounts] | None = None

    @property
    def held_out(self) -> Dataset:
        """The split that the report's metrics are computed on."""
        return self.validation if self.test is None else self.test


def encode_splits(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    *,
    cache_dir: Path,
    with_train: bool = True,
    packed: bool = True,
) -> Encoded:
    """Encode all splits except a stream, or reuse the result of an earlier call with equal content.

    The rows of a split are written whole or not at all into a subfolder of `cache_dir` that is
    named by a content key, with the tokenizer's content in it. Ranks may call this function at the
    same time, but it is cheaper to let one rank run first. Without `with_train`, `train` is empty.
    Without `packed`, every text of causal_lm has rows of its own.
    """
    check_room_for_text(splits.validation, tokenizer, task)
    train = splits.train if with_train and splits.stream is None else None
    parts = {"train": train, "validation": splits.validation, "test": splits.test}
    parts |= {f"{SETS}/{name}": rows for name, rows in splits.evaluation_sets.items()}
    made: dict[str, Dataset] = {}
    chat: CountsByName = {}
    for name, rows in ((name, rows) for name, rows in parts.items() if rows is not None):
        made[name], counts = encode_rows(
            rows, splits.kind, tokenizer, task, name=name, cache_dir=cache_dir, packed=packed
        )
        special_tokens(tokenizer).say(rows, name=name)
        chat |= counts
    if chat:
        log_chat(made, chat, tokenizer)
    counted = made.get("train", made["validation"])
    ids = counted.data.column("input_ids")
    return Encoded(
        train=made.get("train", counted.select([])),
        validation=made["validation"],
        test=made.get("test"),
        tokens_per_row=sum(len(chunk.flatten()) for chunk in ids.chunks) / len(counted),
        evaluation_sets={name: made[f"{SETS}/{name}"] for name in splits.evaluation_sets},
        stream=splits.stream and StreamedRows(splits.stream, tokenizer, task, packed),
        chat=chat or None,
    )


def encode_rows(
    rows: Dataset,
    kind: RowKind,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    *,
    name: str,
    cache_dir: Path,
    packed: bool = True,
) -> tuple[Dataset, CountsByName]:
    """Return encoded rows, memory-mapped, and the numbers of conversations by `name` and source.

    Rows in the cache need no encoder.
    """

    def build(folder: Path) -> None:
        logger.info("encoding the rows of %s", name)
        counts: CountsByName = {}
        if kind.is_chat:
            encoder = ChatEncoder(tokenizer, task, bad=BadRows(task.bad_rows))
            tables = tables_of_conversations(rows, encoder, counts=counts)
        else:
            tables = tables_of_texts(rows, tokenizer, task, packed=packed)
        if not write_tables(folder / ROWS, tables):
            raise no_tokens(rows, task, split=name, counts=counts if kind.is_chat else None)
        write_json(folder / COUNTS, {source: vars(tally) for source, tally in counts.items()})

    parts: dict[str, object] = {
        "version": VERSION,
        "rows": rows_key(rows),
        "tokenizer": tokenizer_content(tokenizer),
        "max_length": task.row_length,
        "type": task.type,
        "packed": packed,
    }
    if kind.is_chat:
        keys = ("chat_template_kwargs", "train_on", "reasoning", "truncation", "bad_rows")
        parts["chat"] = [tokenizer.chat_template, *(getattr(task, key) for key in keys)]
    folder = whole_folder(cache_dir / "encoded" / key_of(parts), build)
    records = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    counts = {
        f"{name}/{source}" if source else name: ChatCounts.from_record(tally)
        for source, tally in records.items()
    }
    return read_rows(folder / ROWS), counts


def no_tokens(
    rows: Dataset, task: TaskConfig, *, split: str, counts: CountsByName | None = None
) -> DataError:
    """Return the error of rows that have no tokens, or whose conversations are all left out.

    counts: of conversations; None: the rows are texts.
    """
    if counts is None:
        return DataError(
            f"the {split} split has {len(rows)} rows and no tokens; check that task.text_columns "
            "names the text and that the text is not blank"
        )
    total = ChatCounts()
    for part in counts.values():
        total.add(part)
    return DataError(
        f"the {split} split has no conversation that can be learned from (task.max_length is "
        f"{task.row_length}): {total.reasons}; raise task.max_length, or check the answers"
    )


def tokens_key(rows: Dataset) -> str:
    """Return a sha256 of the model inputs, without labels, in all rows of a split, in order."""
    return rows_key(rows.select_columns([*{*rows.column_names} - {"label", "labels"}]))


def labelled_only(rows: Dataset) -> Dataset:
    """Return the rows that carry a label, memory-mapped; all rows for language tasks."""
    if "label" not in rows.column_names:
        return rows
    carries = is_labelled(rows)
    if not carries.any():
        raise DataError(
            f"none of the {len(rows)} training rows has a label, and this stage learns only from "
            "labels; check task.label_column, or train without this stage"
        )
    return rows if carries.all() else rows.select(np.flatnonzero(carries))


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, *, context: int | None = None
) -> None:
    """Save a tokenizer for other machines, without the length and the padding of its last call.

    Plain transformers cuts texts for a model that reads at most `context` tokens at this number.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    keys = json.loads(path.read_text(encoding="utf-8"))
    if context is not None:  # the number of a tokenizer without a length is 1e30
        keys["model_max_length"] = min(context, keys["model_max_length"])
    if backend is not None:
        keys |= _keys_of_4(keys, tokenizer)
    write_json(path, {key: keys[key] for key in keys if key not in NOT_EXPORTED})


def _keys_of_4(keys: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the keys with which transformers 4 reads tokenizer.json as transformers 5 does."""
    special = keys.pop("extra_special_tokens", None)  # transformers 4 wants a dict of names
    old: dict[str, Any] = {} if special is None else {"additional_special_tokens": special}
    if keys["tokenizer_class"] not in READ_ALIKE:
        inputs = list(tokenizer.model_input_names)
        old |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
        old["padding_side"] = tokenizer.padding_side  # Gemma's class pads on the left
    pre_tokenizer = cast("Any", tokenizer).backend_tokenizer.pre_tokenizer
    state = {} if pre_tokenizer is None else json.loads(pre_tokenizer.__getstate__())
    if "add_prefix_space" in state:  # else transformers 4 sets it to false
        old["add_prefix_space"] = state["add_prefix_space"]
    return old


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sha256 of all that determines the tokens of a text, the same in every process."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        with tempfile.TemporaryDirectory() as saved:
            tokenizer.save_pretrained(saved)
            folder = Path(saved)
            content: Any = {name: sha256_of(folder / name) for name in files_of(folder)}
    else:
        content = json.loads(backend.to_str())
        # The settings of the last call, which are not properties of the tokenizer.
        content.update(truncation=None, padding=None)
    return key_of(
        {
            "class": type(tokenizer).__name__,
            "content": content,
            "inputs": list(tokenizer.model_input_names),
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            # Settings that every call passes to the backend, which does not store them.
            "truncation_side": tokenizer.truncation_side,
            "split_special_tokens": tokenizer.split_special_tokens,
        }
    )


def mixed(encoded: Encoded, sources: Mapping[str, MixtureSource], *, seed: int) -> Encoded:
    """Return the data with the rows of an epoch: rows of every source in proportion to its weight.

    Rows are counted as they are encoded: a long document has many. They are chosen once, as a
    function of (weights, seed), so that the shares are exact in every epoch, and every row is read
    at least once. The source with the most rows in relation to its weight is read once. The others
    are read as often as their weight asks: whole, and then a share that the seed chooses.
    """
    parts = {name: (encoded.chat or {}).get(f"train/{name}", ChatCounts()) for name in sources}
    for name, part in parts.items():
        if not part.kept:
            raise DataError(
                f"task.mixture.{name}: no row is left for training: {part.rows} of its rows are "
                "not held out for validation, and none of them can be encoded; set "
                "task.validation_files, or give the source more rows"
            )
    sizes = np.array([part.kept for part in parts.values()])
    weights = np.array([source.weight for source in sources.values()])
    # The shares differ from the weights by less than a row.
    counts = np.rint((sizes / weights).max() * weights).astype(np.int64).clip(min=sizes)
    chosen: list[NDArray[np.int64]] = []
    # The rows of a source follow each other.
    for number, (name, end) in enumerate(zip(sources, np.cumsum(sizes), strict=True)):
        size, count = int(sizes[number]), int(counts[number])
        places = np.arange(end - size, end)
        random = np.random.default_rng([seed, number])
        chosen += [np.tile(places, count // size), random.permutation(places)[: count % size]]
        logger.log(
            logging.WARNING if count / size > MANY_TIMES else logging.INFO,
            "mixture: %s has %d training rows; an epoch reads %d rows of it (%.1f %% of all rows, "
            "each row %.2f times)",
            *(name, size, count, 100 * count / counts.sum(), count / size),
        )
    tokens = np.array([part.tokens for part in parts.values()])
    return encoded._replace(
        train=encoded.train.select(np.sort(np.concatenate(chosen))),
        tokens_per_row=float((tokens / sizes * counts).sum() / counts.sum()),
    )
