"""The vocabulary of a student whose teacher keeps another one, trained on the training text."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import sentencepiece
from tokenizers import Regex, normalizers
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from megakd.contract.options import SMALLEST_VOCABULARY, StudentVocabulary, VocabularyType
from megakd.data.arrow import key_of, rows_key
from megakd.data.splits import Splits
from megakd.data.tokenizers import (
    MODEL_FILE,
    SentencePieceTokenizer,
    from_folder,
    sentencepiece_backend,
    training_texts,
)
from megakd.data.vocabularies import (
    ENCODER_ROLES,
    UNKNOWN,
    encoder_template,
    sentences,
    tell_long_words,
    train_tokenizer,
)
from megakd.data.vocabularies import VERSION as TRAINER_VERSION
from megakd.errors import DataError
from megakd.storage.folders import whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Texts = Callable[[], Iterable[str]]

# Part of every key: increase this number when the trained vocabularies would differ.
VERSION = 1
SIZE_KEY = "method.student_vocabulary.size"
# Sums of such scores are exact in SentencePiece's float32 and in the float64 of `tokenizers`, so
# that both choose the same pieces where several segmentations have equal scores.
SCORES_PER_NAT = 256
# More than there are characters in Unicode.
_ANY_NUMBER = 1 << 21
_NEEDED_FOR = {
    "pad": "fills texts of different length up to one length",
    "unk": "stands for text that has no other token",
    "cls": "starts every text",
    "sep": "ends every text",
    "mask": "takes the place of the tokens to predict",
}


def load_student_tokenizer(
    vocabulary: StudentVocabulary, splits: Splits, *, cache_dir: Path
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a student, with exactly `vocabulary.size` tokens.

    The tokenizer is lower-cased, has BERT's template ([CLS] text [SEP]) and BERT's special tokens,
    and is trained once per training text. With `unigram` and `bpe`, `save_pretrained` also writes
    the SentencePiece model, as spiece.model. The tokenizer encodes a text as that model does,
    except for:

    * the names of special tokens in a text, such as [MASK]: the tokenizer reads the special token,
      and SentencePiece reads the characters;
    * characters that the normalizers of the two libraries treat differently: U+0085, İ, and
      accents on letters in unusual forms, such as two accents on one letter.
    """
    key = key_of(
        {
            "version": (VERSION, TRAINER_VERSION),
            "content": splits.content_hash,
            "rows": rows_key(splits.train),
            "type": vocabulary.type,
            "student_size": vocabulary.size,
        }
    )

    def build(folder: Path) -> None:
        _trained(vocabulary, lambda: training_texts(splits)).save_pretrained(folder)

    folder = whole_folder(cache_dir / "tokenizers" / key, build)
    return from_folder(folder, "classification")


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Check the pad, unk, cls, sep and mask token, and that cls and sep are around every text.

    An error message begins with `where`: a config key, a folder or a name.
    """
    taken: dict[int, str] = {}
    for role in _NEEDED_FOR:
        number = _id_of(tokenizer, role, where)
        if number in taken:
            raise DataError(
                f"{where}: {tokenizer.convert_ids_to_tokens(number)} is both the {taken[number]} "
                f"token and the {role} token of the tokenizer; set {role}_token in its "
                "tokenizer_config.json to a token of its own"
            )
        taken[number] = role
    _check_template(tokenizer, where)


def _id_of(tokenizer: PreTrainedTokenizerBase, role: str, where: str) -> int:
    token = getattr(tokenizer, f"{role}_token")
    if token is None:
        raise DataError(
            f"{where}: the tokenizer has no {role} token, which {_NEEDED_FOR[role]}; set "
            f"{role}_token in its tokenizer_config.json, or use another tokenizer"
        )
    number = tokenizer.get_vocab().get(str(token))
    if number is None:
        raise DataError(
            f"{where}: the {role} token {token} is not in the vocabulary of the tokenizer; set "
            f"{role}_token in its tokenizer_config.json to a token of the vocabulary"
        )
    stored = tokenizer.convert_ids_to_tokens(number)
    if stored != str(token):
        raise DataError(
            f"{where}: the {role} token {token} has the id {number}, which is the id of {stored} "
            "in the vocabulary of the tokenizer; give every token an id of its own"
        )
    return number


def _check_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    ids: Any = tokenizer("a")["input_ids"]
    for role, place, number in (("cls", "first", ids[0]), ("sep", "last", ids[-1])):
        expected = getattr(tokenizer, f"{role}_token")
        piece = tokenizer.convert_ids_to_tokens(number)
        if piece != expected:
            raise DataError(
                f"{where}: the tokenizer puts {piece} {place} in an encoded text, and {expected}, "
                f"its {role} token, is expected there; set cls_token and sep_token in its "
                "tokenizer_config.json to the tokens that start and end a text"
            )


def _trained(vocabulary: StudentVocabulary, texts: Texts) -> PreTrainedTokenizerBase:
    tokenizer = _at_most(vocabulary.type, texts, vocabulary.size)
    if len(tokenizer) > vocabulary.size:
        raise _too_small(len(tokenizer), vocabulary.size)
    if len(tokenizer) < vocabulary.size:
        largest = _largest(vocabulary.type, texts, len(tokenizer))
        # SentencePiece also takes pieces that occur once.
        which = " that occur at least twice" if vocabulary.type == "wordpiece" else ""
        lower = (
            f"set {SIZE_KEY} to at most {largest}, or " if largest >= SMALLEST_VOCABULARY else ""
        )
        raise DataError(
            f"the training text gives only {largest} pieces{which}, special tokens included, and "
            f"{SIZE_KEY} is {vocabulary.size}; {lower}give more text"
        )
    return tokenizer


def _too_small(smallest: int, size: int) -> DataError:
    return DataError(
        f"the special tokens and the characters of the training text take {smallest} pieces, and "
        f"{SIZE_KEY} is {size}; set {SIZE_KEY} to at least {smallest}"
    )


def _largest(kind: VocabularyType, texts: Texts, size: int) -> int:
    """Return the largest size, at most `size`, that the texts fill.

    A smaller size may leave out rare characters, and then gives fewer pieces than counted before.
    """
    while size >= SMALLEST_VOCABULARY:
        count = len(_at_most(kind, texts, size))
        if count >= size:
            break
        size = count
    return size


def _at_most(kind: VocabularyType, texts: Texts, size: int) -> PreTrainedTokenizerBase:
    if kind == "wordpiece":
        return train_tokenizer(texts, kind=kind, vocab_size=size, for_encoder=True)
    try:
        model = _sentencepiece_model(kind, texts, size)
    except RuntimeError as error:
        raise _too_small(_characters(texts), size) from error
    return _as_tokenizer(model)


def _characters(texts: Texts) -> int:
    try:
        model = _sentencepiece_model("char", texts, _ANY_NUMBER)
    except RuntimeError as error:
        raise DataError(
            "the training text gives no pieces for method.student_vocabulary: "
            f"{error}; check task.text_columns and the data"
        ) from error
    return len(sentencepiece.SentencePieceProcessor(model_proto=model))


def _sentencepiece_model(kind: Literal["unigram", "bpe", "char"], texts: Texts, size: int) -> bytes:
    # SentencePiece silently drops sentences with U+2585, which it uses to mark unknown text.
    spaces = normalizers.Sequence([normalizers.Replace(Regex(r"[\s▅]+"), " "), normalizers.Strip()])
    tell_long_words(texts(), lambda run: [run])
    special = list(ENCODER_ROLES.values())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(texts(), spaces),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        pad_piece=ENCODER_ROLES["pad_token"],
        unk_id=1,
        unk_piece=UNKNOWN,
        bos_id=-1,
        eos_id=-1,
        control_symbols=special[2:],
        # The result depends on the number of threads.
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _as_tokenizer(model: bytes) -> SentencePieceTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, MODEL_FILE)
        file.write_bytes(model)
        extractor = SentencePieceExtractor(str(file))
    # A class generated at run time, whose fields are unknown to the type checker.
    proto: Any = extractor.proto
    for piece in proto.pieces:
        piece.score = round(piece.score * SCORES_PER_NAT) / SCORES_PER_NAT
    backend = sentencepiece_backend(extractor)
    backend.post_processor = encoder_template(backend, cls="[CLS]", sep="[SEP]")
    tokenizer = SentencePieceTokenizer(
        tokenizer_object=backend,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **ENCODER_ROLES,
    )
    tokenizer.sentencepiece_model = proto.SerializeToString(deterministic=True)
    return tokenizer
