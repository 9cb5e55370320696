"""Tokenizers trained on the run's text. Equal texts result in identical tokenizers."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Literal

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

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
