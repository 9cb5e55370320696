"""The tokenizer of a run: given by name, read from a folder, or trained on the text."""

from __future__ import annotations

import copy
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megakd.config.paths import expand_path, is_path
from megakd.config.task import TaskConfig, TaskType, TokenizerConfig
from megakd.data.arrow import arrow_batches, key_of, rows_key
from megakd.data.chat_template import read_template
from megakd.data.hub import silent_hub
from megakd.data.splits import Splits
from megakd.errors import DataError, first_line
from megakd.process.seals import check_given, whole_folder

logger = logging.getLogger(__name__)

# Part of every key: increase this number when the trained tokenizers would differ.
VERSION = 2

Kind = Literal["wordpiece", "bpe"]

UNKNOWN = "[UNK]"

ENCODER_ROLES = {
    "pad_token": "[PAD]",
    "unk_token": UNKNOWN,
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}

END_OF_TEXT = "<|endoftext|>"

DECODER_ROLES = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": UNKNOWN}

# Rarer pairs are accidental; the limit also keeps the vocabulary of a short text small.
MIN_FREQUENCY = 2

LONGEST_WORD = 1000
"""In characters."""


def train_tokenizer(
    texts: Callable[[], Iterable[str]], *, kind: Kind, vocab_size: int, for_encoder: bool
) -> PreTrainedTokenizerFast:
    """Train a tokenizer with at most `vocab_size` tokens, including special tokens.

    Args:
        texts: function that returns the training texts; may be called more than once.
        kind: `wordpiece` is lower-cased like BERT's tokenizer, `bpe` works on bytes like GPT-2's.
        for_encoder: whether the special tokens are [CLS], [SEP], [PAD] and [MASK], with [CLS] and
            [SEP] added to texts; otherwise only <|endoftext|>, which packing appends to documents.
    """
    train = {"wordpiece": _wordpiece, "bpe": _byte_bpe}[kind]
    roles = dict(ENCODER_ROLES if for_encoder else DECODER_ROLES)
    if kind == "bpe" and not for_encoder:
        # Every byte is a token, so that no token is unknown.
        roles["unk_token"] = END_OF_TEXT
    tokenizer = train(texts, vocab_size, list(dict.fromkeys(roles.values())))
    names = ["input_ids", "attention_mask"]
    if for_encoder:
        tokenizer.post_processor = encoder_template(tokenizer, cls="[CLS]", sep="[SEP]")
        names.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **roles)


def encoder_template(tokenizer: Tokenizer, *, cls: str, sep: str) -> processors.TemplateProcessing:
    """Return BERT's template: cls text sep, and for pairs cls text sep text sep."""
    numbers = [(token, tokenizer.token_to_id(token)) for token in (cls, sep)]
    return processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=numbers,
    )


def _wordpiece(texts: Callable[[], Iterable[str]], size: int, special: list[str]) -> Tokenizer:
    normalizer = normalizers.BertNormalizer(lowercase=True)
    scaffold = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    scaffold.normalizer = normalizer
    scaffold.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts = Counter(chain.from_iterable(map(normalizer.normalize_str, texts())))
    ranked = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    characters = sorted(ranked[: max(100, size // 10)])
    # The trainer numbers tokens such as "##x" in the order of a randomly seeded hash map, and
    # breaks ties between merges by number. Special tokens are numbered in the given order.
    inside = [f"##{c}" for c in characters if not unicodedata.category(c).startswith("P")]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[*special, *characters, *inside],
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,
    )
    _train_on_pieces(scaffold, texts, trainer)
    tokenizer = Tokenizer(models.WordPiece(scaffold.get_vocab(), unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = scaffold.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _byte_bpe(texts: Callable[[], Iterable[str]], size: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    _train_on_pieces(tokenizer, texts, trainer)
    return tokenizer


def _train_on_pieces(
    tokenizer: Tokenizer, texts: Callable[[], Iterable[str]], trainer: trainers.Trainer
) -> None:
    # Time and memory of the trainers grow with the square of a word's length.
    whole = tokenizer.pre_tokenizer
    pieces = [whole, pre_tokenizers.FixedLength(LONGEST_WORD)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.pre_tokenizer = whole


LOOKED_FOR = (
    "tokenizer.json or a SentencePiece model (spiece.model, tokenizer.model) with its "
    "tokenizer_config.json or config.json, vocab.txt, or vocab.json with merges.txt"
)

DEFAULT_VOCAB_SIZE = 8000

CONFIGS = {"tokenizer_config.json", "config.json"}
"""Files that tell transformers the class of a tokenizer."""

MODELS = {"tokenizer.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"}


class VocabularyPair(NamedTuple):
    """The tokenizers of a student and of its teacher, which reads the pieces of both.

    In the teacher's input, numbers below `offset` are the teacher's tokens; `offset` + n is the
    student's token n.
    """

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase

    @property
    def offset(self) -> int:
        """The number of the student's token 0 in the teacher's input."""
        return len(self.teacher)

    @property
    def overlap(self) -> float:
        """The share of the student's pieces that are in the teacher's vocabulary, from 0 to 1.

        Pieces are compared as strings, so that `##s` and `s` differ. Special tokens do not count.
        """
        pieces = set(self.student.get_vocab()).difference(self.student.all_special_tokens)
        known = set(self.teacher.get_vocab()).difference(self.teacher.all_special_tokens)
        return len(pieces & known) / max(1, len(pieces))

    def summary(self) -> dict[str, str | float]:
        """Return what the report says of the student's vocabulary."""
        return {
            "vocabulary.type": "wordpiece",
            "vocabulary.size": len(self.student),
            "vocabulary.teacher_size": len(self.teacher),
            "vocabulary.overlap": self.overlap,
        }


def load_tokenizer(
    task: TaskConfig, splits: Splits, *, model_folders: Sequence[Path], cache_dir: Path
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of all data and all models of a run.

    Without `task.tokenizer` it is that of the first of `model_folders` that has one. If there is
    none, a tokenizer of at most 8000 tokens is trained on the training text (WordPiece for
    encoders, byte-level BPE for causal_lm).
    """
    spec, own = task.tokenizer, next(filter(has_tokenizer_files, model_folders), None)
    if isinstance(spec, str):
        tokenizer, origin = _named(spec), f'task.tokenizer "{spec}"'
    elif spec is None and own is not None:
        tokenizer, origin = from_folder(own), f"the tokenizer in {own}"
    else:
        kind = "bpe" if task.type == "causal_lm" else "wordpiece"
        spec = spec or TokenizerConfig(type=kind, vocab_size=DEFAULT_VOCAB_SIZE)
        tokenizer = _trained(spec, task.type, splits, cache_dir)
        origin = f"{spec.type} trained on the training text"
    needed = {"pad": "to put texts of different length into one batch"}
    if task.type == "causal_lm":
        needed = {}
    elif task.type == "mlm":
        needed["mask"] = "to put it in the place of the tokens to predict"
    end = tokenizer.eos_token
    if task.type in ("classification", "regression") and not (tokenizer.pad_token or end is None):
        # A decoder is asked for its last token before the padding, in training as afterwards.
        tokenizer.pad_token = end
        logger.info("%s has no pad token: its end token %s is taken", origin, end)
    for role, why in needed.items():
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise DataError(
                f"{origin} has no {role} token, which {task.type} needs {why}; set {role}_token in "
                "its tokenizer_config.json, or use another tokenizer"
            )
    if task.chat_template is not None:
        tokenizer.chat_template = read_template(task.chat_template)
    logger.info("tokenizer: %s, %d tokens", origin, len(tokenizer))
    return tokenizer


def has_tokenizer_files(folder: Path) -> bool:
    """Return whether a folder has files, or a GGUF file has parts, that give a tokenizer."""
    if folder.is_file():
        return _of_gguf(folder) is not None
    files = {path.name for path in folder.glob("*") if path.is_file()}
    has_config = not (files.isdisjoint(MODELS) or files.isdisjoint(CONFIGS))
    return has_config or "vocab.txt" in files or {"vocab.json", "merges.txt"} <= files


def _named(spec: str) -> PreTrainedTokenizerBase:
    folder = expand_path(spec)
    if folder.is_dir() and has_tokenizer_files(folder):
        return from_folder(folder)
    if folder.exists() or is_path(spec):
        problem = "it has no tokenizer files" if folder.exists() else "the folder does not exist"
        raise DataError(f'task.tokenizer "{spec}": {problem}; the folder must hold {LOOKED_FOR}')
    silent = silent_hub()
    try:
        return AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
    except Exception as error:
        raise DataError(
            f'task.tokenizer "{spec}" is not a local folder and cannot be loaded from the Hub: '
            f"{silent or first_line(error)}. Check the name; without a network, download the "
            f"tokenizer first, or give a folder that holds {LOOKED_FOR}"
        ) from error


def from_folder(folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a folder, unless megakd wrote it and a file was changed."""
    # Weights are verified when they are loaded.
    check_given(folder, "task.tokenizer", wanted=lambda name: not name.endswith(".safetensors"))
    try:
        if folder.is_file():
            tokenizer = _of_gguf(folder)
            if tokenizer is None:
                reason = "transformers reads no tokenizer of this GGUF file"
                raise ValueError(reason)  # noqa: TRY301 - the message below ends with it
            return copy.deepcopy(tokenizer)
        files = {path.name for path in folder.iterdir()}
        if not files.isdisjoint(CONFIGS):
            auto = AutoTokenizer.from_pretrained
            return auto(folder, local_files_only=True, trust_remote_code=False)
        reader = BertTokenizer if "vocab.txt" in files else GPT2Tokenizer
        return reader.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # Broken files may raise KeyError, JSONDecodeError or a plain Exception.
        raise DataError(
            f"the tokenizer files in {folder} cannot be read: {first_line(error)}. Download the "
            "files again, or set task.tokenizer to another tokenizer"
        ) from error


@cache
def _of_gguf(file: Path) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
    except Exception as error:  # noqa: BLE001 - of a kind unknown to transformers, or none
        logger.warning("transformers reads no tokenizer of %s: %s", file, first_line(error))
        return None


def _trained(
    recipe: TokenizerConfig, task_type: TaskType, splits: Splits, cache_dir: Path
) -> PreTrainedTokenizerBase:
    if splits.stream is not None:
        raise DataError(
            "task.tokenizer: not set, no model has tokenizer files, and a tokenizer cannot be "
            "trained on a stream (task.streaming is true); set task.tokenizer to a folder or a Hub "
            "id"
        )
    for_encoder = task_type != "causal_lm"
    rows = rows_key(splits.train)
    key = key_of(VERSION, rows, recipe.type, recipe.vocab_size, for_encoder)

    def build(folder: Path) -> None:
        logger.info("training a %s of %d tokens", recipe.type, recipe.vocab_size)
        train_tokenizer(
            lambda: training_texts(splits),
            kind=recipe.type,
            vocab_size=recipe.vocab_size,
            for_encoder=for_encoder,
        ).save_pretrained(folder)

    folder = whole_folder(cache_dir / "tokenizers" / key, build)
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def training_texts(splits: Splits) -> Iterator[str]:
    """Yield the texts of all training rows, and the texts that they are paired with."""
    columns = [name for name in ("text", "text_pair") if name in splits.train.column_names]
    for table in arrow_batches(splits.train.select_columns(columns), 1000):
        for name in columns:
            yield from table.column(name).to_pylist()


_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's mark of a space."""


def rows_for(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest token number plus 1, more than `len(tokenizer)` if numbers have gaps."""
    return 1 + max(tokenizer.get_vocab().values())


def characters_of_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return [V] int64 the number of characters of every token, without white space.

    A special token has none. A token of bytes counts the characters that begin in the token. V is
    the largest token number plus 1.
    """
    backend, prefix, none = getattr(tokenizer, "backend_tokenizer", None), "", {_SPACE}
    if backend is not None and isinstance(backend.model, models.WordPiece):
        prefix, none = backend.model.continuing_subword_prefix, set[str]()
    elif backend is not None and isinstance(backend.decoder, decoders.ByteLevel):
        signs = bytes_to_unicode().items()  # GPT-2 shows every byte of a text as a sign
        none = {sign for byte, sign in signs if 128 <= byte < 192 or bytes([byte]).isspace()}
    counts = torch.zeros(rows_for(tokenizer), dtype=torch.long)
    special = set(tokenizer.all_special_ids)
    for token, number in tokenizer.get_vocab().items():
        if number not in special:
            counts[number] = sum(sign not in none for sign in token.removeprefix(prefix))
    return counts
