"""The vocabulary of a student whose teacher keeps another one, trained on the training text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.data.arrow import key_of, rows_key
from megakd.data.splits import Splits
from megakd.data.tokenizers import from_folder, training_texts
from megakd.data.vocabularies import VERSION as TRAINER_VERSION
from megakd.data.vocabularies import train_tokenizer
from megakd.errors import DataError
from megakd.process.folders import whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Texts = Callable[[], Iterable[str]]

# Part of every key: increase this number when the trained vocabularies would differ.
VERSION = 1
SIZE_KEY = "method.student_vocabulary"
ROLES = ("pad", "unk", "cls", "sep", "mask")


def load_student_tokenizer(
    pieces: int, splits: Splits, *, cache_dir: Path
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a student, with exactly `pieces` tokens.

    The tokenizer is lower-cased, has BERT's template ([CLS] text [SEP]) and BERT's special tokens,
    and is trained once per training text.
    """
    key = key_of(
        {
            "version": (VERSION, TRAINER_VERSION),
            "rows": rows_key(splits.train),
            "type": "wordpiece",
            "student_size": pieces,
        }
    )

    def build(folder: Path) -> None:
        _trained(pieces, lambda: training_texts(splits)).save_pretrained(folder)

    folder = whole_folder(cache_dir / "tokenizers" / key, build)
    return from_folder(folder)


def _trained(size: int, texts: Texts) -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer(texts, kind="wordpiece", vocab_size=size, for_encoder=True)
    count = len(tokenizer)
    if count > size:
        raise DataError(
            f"the special tokens and the characters of the training text take {count} pieces, and "
            f"{SIZE_KEY} is {size}; set {SIZE_KEY} to at least {count}"
        )
    if count < size:
        raise DataError(
            f"the training text gives only {count} pieces that occur at least twice, special "
            f"tokens included, and {SIZE_KEY} is {size}; lower {SIZE_KEY}, or give more text"
        )
    return tokenizer


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Check that pad, unk, cls, sep and mask differ, and that cls and sep are around every text.

    An error message begins with `where`: a config key, a folder or a name.
    """
    vocabulary, roles = tokenizer.get_vocab(), dict[int, str]()
    for role in ROLES:
        token = getattr(tokenizer, f"{role}_token")
        number = vocabulary.get(str(token))
        if number is None:
            raise DataError(
                f"{where}: the tokenizer has no {role} token ({token}); set {role}_token in its "
                "tokenizer_config.json to a token of the vocabulary, or use another tokenizer"
            )
        if number in roles:
            raise DataError(
                f"{where}: {token} is both the {roles[number]} token and the {role} token of the "
                f"tokenizer; set {role}_token in its tokenizer_config.json to a token of its own"
            )
        roles[number] = role
    ids: Any = tokenizer("a")["input_ids"]
    first, last = tokenizer.convert_ids_to_tokens([ids[0], ids[-1]])
    if [roles.get(ids[0]), roles.get(ids[-1])] != ["cls", "sep"]:
        raise DataError(
            f"{where}: an encoded text begins with {first} and ends with {last}, and the "
            f"tokenizer's cls token is {tokenizer.cls_token} and its sep token "
            f"{tokenizer.sep_token}; set both in its tokenizer_config.json to the tokens that "
            "start and end a text"
        )
