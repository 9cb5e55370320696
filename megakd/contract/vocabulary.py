"""The vocabulary that a student gets of its own, and text cut with it; imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from megakd.contract.terms import STRICT

SMALLEST_VOCABULARY = 100
VocabularyType = Literal["wordpiece", "unigram", "bpe"]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class StudentVocabulary:
    """A lower-cased vocabulary that is trained on the training text of the run.

    type: `wordpiece` is BERT's kind. `unigram` and `bpe` are SentencePiece models, whose words are
        not the words of a WordPiece teacher.
    size: number of pieces, including the five special tokens. 4928 is the size of Zhao et al. 2019.
    """

    type: VocabularyType = "wordpiece"
    size: Annotated[int, Field(ge=SMALLEST_VOCABULARY)] = 4928


class MixedReading(NamedTuple):
    """Text as a model with a tokenizer of its own reads it in a stage.

    probability: probability of each word to be cut with the student's vocabulary. Above 0, the
        model gets a second table of embeddings and a second output layer, for the student's pieces.
    is_narrow: whether this table has the columns of the student's table and is lifted by an affine
        map; otherwise the table has the columns of the model's own table.
    """

    probability: float
    is_narrow: bool = False
