"""The vocabulary of a student whose teacher keeps another one, trained on the training text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.contract.options import SMALLEST_VOCABULARY, StudentVocabulary
from megakd.data.arrow import key_of, rows_key
from megakd.data.splits import Splits
from megakd.data.tokenizers import from_folder, training_texts
from megakd.data.vocabularies import VERSION as TRAINER_VERSION
from megakd.data.vocabularies import train_tokenizer
from megakd.errors import DataError
from megakd.storage.folders import whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Texts = Callable[[], Iterable[str]]

# Part of every key: increase this number when the trained vocabularies would differ.
VERSION = 1
SIZE_KEY = "method.student_vocabulary.size"
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
    and is trained once per training text.
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
        _trained(vocabulary.size, lambda: training_texts(splits)).save_pretrained(folder)

    folder = whole_folder(cache_dir / "tokenizers" / key, build)
    return from_folder(folder, "classification")


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Check the pad, unk, cls, sep and mask token, and that cls and sep are around every text.

    An error message begins with `where`: a config key, a folder or a name.
    """
    vocabulary, taken = tokenizer.get_vocab(), dict[int, str]()
    for role, need in _NEEDED_FOR.items():
        token = getattr(tokenizer, f"{role}_token")
        if token is None:
            raise DataError(
                f"{where}: the tokenizer has no {role} token, which {need}; set {role}_token in "
                "its tokenizer_config.json, or use another tokenizer"
            )
        number = vocabulary.get(str(token))
        if number is None:
            raise DataError(
                f"{where}: the {role} token {token} is not in the vocabulary of the tokenizer; set "
                f"{role}_token in its tokenizer_config.json to a token of the vocabulary"
            )
        stored = tokenizer.convert_ids_to_tokens(number)
        if stored != str(token):
            raise DataError(
                f"{where}: the {role} token {token} has the id {number}, which is the id of "
                f"{stored} in the vocabulary of the tokenizer; give every token an id of its own"
            )
        if number in taken:
            raise DataError(
                f"{where}: {stored} is both the {taken[number]} token and the {role} token of the "
                f"tokenizer; set {role}_token in its tokenizer_config.json to a token of its own"
            )
        taken[number] = role
    _check_template(tokenizer, where)


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


def _trained(size: int, texts: Texts) -> PreTrainedTokenizerBase:
    tokenizer = _at_most(size, texts)
    if len(tokenizer) > size:
        raise DataError(
            f"the special tokens and the characters of the training text take {len(tokenizer)} "
            f"pieces, and {SIZE_KEY} is {size}; set {SIZE_KEY} to at least {len(tokenizer)}"
        )
    if len(tokenizer) < size:
        largest = _largest(len(tokenizer), texts)
        lower = (
            f"set {SIZE_KEY} to at most {largest}, or " if largest >= SMALLEST_VOCABULARY else ""
        )
        raise DataError(
            f"the training text gives only {largest} pieces that occur at least twice, special "
            f"tokens included, and {SIZE_KEY} is {size}; {lower}give more text"
        )
    return tokenizer


def _largest(size: int, texts: Texts) -> int:
    """Return the largest size, at most `size`, that the texts fill.

    A smaller size may leave out rare characters, and then gives fewer pieces than counted before.
    """
    while size >= SMALLEST_VOCABULARY:
        count = len(_at_most(size, texts))
        if count >= size:
            break
        size = count
    return size


def _at_most(size: int, texts: Texts) -> PreTrainedTokenizerBase:
    return train_tokenizer(texts, kind="wordpiece", vocab_size=size, for_encoder=True)
