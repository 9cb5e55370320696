"""Whole-word masking: words of any fast tokenizer, in the encoded rows and in the masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_tokenizer import Words
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE, Batch
from megakd.data.collation import Collator
from megakd.data.encoding import encode_rows
from megakd.data.masking import Masking, task_masking
from megakd.data.vocabularies import train_tokenizer
from megakd.data.words import WORD_STARTS, check_words, word_starts
from megakd.errors import DataError

TEXT = "the unbelievable cats, it isn't naïve"
WORDS = {"wordpiece": "the|unbelievable|cats|,|it|isn|'|t|naïve", "bpe": None, "unigram": None}
WORDS["bpe"] = "the| unbelievable| cats|,| it| isn|'t| naïve"
WORDS["unigram"] = "the| unbelievable| cats,| it| isn't| naïve"


def trained(kind: Any, size: int = 300) -> PreTrainedTokenizerFast:
    letters = [*TEXT, "abcdefghijklmnopqrstuvwxyz", "able cat the it is"] * 3
    return train_tokenizer(lambda: letters, kind=kind, vocab_size=size, for_encoder=True)


def words_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The text of each word, as the offsets of its tokens have it."""
    encoded = tokenizer([text], add_special_tokens=False)
    (starts,) = word_starts(encoded, [text])
    spans = encoded.encodings[0].offsets  # type: ignore[index]
    firsts = [spans[p][0] for p, start in enumerate(starts) if p == start]
    return [text[a:b] for a, b in zip(firsts, [*firsts[1:], len(text)], strict=True)]


@pytest.mark.parametrize("kind", list(WORDS))
def test_a_word_is_what_the_tokenizer_cuts_off_before_it_looks_for_pieces(kind):
    found = [word.strip() for word in words_of(trained(kind), TEXT)]

    assert found == [word.strip() for word in str(WORDS[kind]).split("|")]


def test_pieces_of_a_tokenizer_without_words_are_cut_at_white_space():
    made = Tokenizer(models.BPE({c: n for n, c in enumerate("▁abcd")}, []))
    made.normalizer = normalizers.Replace(" ", "▁")

    found = words_of(PreTrainedTokenizerFast(tokenizer_object=made), "ab cad d")

    assert found == ["ab", " cad", " d"]


def test_a_special_token_in_the_text_is_a_word_of_its_own():
    tokenizer = trained("wordpiece")

    assert words_of(tokenizer, "cats[MASK]cats") == ["cats", "[MASK]", "cats"]


def test_a_tokenizer_that_does_not_tell_words_is_refused_with_the_key():
    with pytest.raises(DataError, match=r"whole_word_masking: the tokenizer is a Words, .*use a"):
        check_words(Words())


def task(**keys: Any) -> TaskConfig:
    given = {"max_length": 12, "whole_word_masking": True} | keys
    return TaskConfig(type="mlm", dataset="none", **given)


def encoded(texts: list[str], folder: Any, tokenizer: Any, **keys: Any) -> tuple[Dataset, str]:
    rows = Dataset.from_dict({"text": texts})
    made, key = encode_rows(
        {"train": rows}, tokenizer, task(**keys), content_hash="same", cache_dir=folder
    )
    return made["train"], key


def test_words_are_written_only_with_the_option_under_a_key_of_their_own(tmp_path):
    tokenizer = trained("wordpiece")
    plain, plain_key = encoded([TEXT], tmp_path, tokenizer, whole_word_masking=False)
    words, key = encoded([TEXT], tmp_path, tokenizer)

    assert plain.column_names == ["input_ids"]
    assert words.column_names == ["input_ids", WORD_STARTS]
    assert plain["input_ids"][:] == words["input_ids"][:]
    assert key != plain_key


@given(
    texts=st.lists(st.text("abc ,\n", min_size=1, max_size=60), min_size=1, max_size=4),
    kind=st.sampled_from(list(WORDS)),
    length=st.integers(4, 20),
)
@settings(max_examples=25, deadline=None)
def test_every_row_counts_its_words_from_its_own_start(tmp_path_factory, texts, kind, length):
    tokenizer = trained(kind)
    texts = [f"cats {text}" for text in texts]
    rows, _ = encoded(texts, tmp_path_factory.mktemp("cache"), tokenizer, max_length=length)

    for ids, starts in zip(rows["input_ids"], rows[WORD_STARTS], strict=True):
        assert len(starts) == len(ids) <= length
        assert all(starts[start] == start <= place for place, start in enumerate(starts))
        assert starts == sorted(starts)
        assert starts[:2] == [0, 1]  # [CLS] is a word of its own, and so is [SEP]
        assert starts[-1] == len(ids) - 1


def batch_of(words: list[list[int]], tokenizer: Any, *, dummy_rows: int = 0) -> Batch:
    """One row per list of lengths of words; the tokens are any that may be masked."""
    rows = []
    for lengths in words:
        starts = [0]
        for length in lengths:
            starts += [len(starts)] * length
        ids = [2, *range(10, 10 + len(starts) - 1), 3]
        rows.append({"input_ids": ids, WORD_STARTS: [*starts, len(starts)]})
    return Collator(tokenizer, task(max_length=512))(rows, dummy_rows=dummy_rows)


def masking(tokenizer: Any, **keys: Any) -> Masking:
    made = task_masking(tokenizer, task(**keys))
    assert made is not None
    return made


@pytest.fixture(scope="module")
def wordpiece() -> PreTrainedTokenizerFast:
    return trained("wordpiece")


LENGTHS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=20), min_size=1, max_size=4)


@given(words=LENGTHS, seed=st.integers(0, 99), draw=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_all_pieces_of_a_word_are_chosen_or_none(wordpiece, words, seed, draw):
    plain = batch_of(words, wordpiece, dummy_rows=1)
    masked = masking(wordpiece)(plain, np.arange(len(words)), seed=seed, draw=draw)

    assert WORD_STARTS in plain.inputs
    assert WORD_STARTS not in masked.inputs  # no model takes it
    for chosen, starts, lengths in zip(
        masked.labels != IGNORE, plain.inputs[WORD_STARTS], words, strict=False
    ):
        assert torch.equal(chosen[: sum(lengths) + 2], chosen[starts][: sum(lengths) + 2])
        assert chosen.any()
        assert not chosen[0]


def test_the_expected_share_of_tokens_is_the_one_of_the_config(wordpiece):
    rng = np.random.default_rng(0)
    words = [rng.integers(1, 6, size=40).tolist() for _ in range(1000)]
    masked = masking(wordpiece, mlm_probability=0.2)(
        batch_of(words, wordpiece), np.arange(1000), seed=1, draw=0
    )
    lengths = np.concatenate(words)

    share = int((masked.labels != IGNORE).sum()) / lengths.sum()
    # Five standard deviations; a word of n tokens counts n times.
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 * (lengths**2).sum()) ** 0.5 / lengths.sum()


def test_each_piece_of_a_chosen_word_is_masked_replaced_or_kept_for_itself(wordpiece):
    words = [[4] * 10] * 500
    plain = batch_of(words, wordpiece)
    masked = masking(wordpiece)(plain, np.arange(500), seed=1, draw=0)
    chosen = masked.labels != IGNORE
    hidden = (masked.inputs["input_ids"] == wordpiece.mask_token_id)[chosen].reshape(-1, 4)

    share = hidden.double().mean()
    assert abs(share - 0.8) < 5 * (0.8 * 0.2 / hidden.numel()) ** 0.5
    whole = hidden.all(dim=1).double().mean()
    assert abs(whole - 0.8**4) < 5 * (0.8**4 * (1 - 0.8**4) / len(hidden)) ** 0.5


def test_words_of_one_token_have_the_masks_of_tokens(wordpiece):
    words = [[1] * 30] * 5
    with_words = batch_of(words, wordpiece)
    inputs = {k: v for k, v in with_words.inputs.items() if k != WORD_STARTS}
    masks = [
        masking(wordpiece)(batch, np.arange(5), seed=1, draw=2)
        for batch in (with_words, with_words._replace(inputs=inputs))
    ]

    assert torch.equal(masks[0].labels, masks[1].labels)
    assert torch.equal(masks[0].inputs["input_ids"], masks[1].inputs["input_ids"])


@given(words=LENGTHS)
@settings(max_examples=30, deadline=None)
def test_masks_do_not_depend_on_padding_or_on_the_other_rows(wordpiece, words):
    together = masking(wordpiece)(
        batch_of(words, wordpiece, dummy_rows=2), np.arange(len(words)), seed=3, draw=1
    )

    for number, lengths in enumerate(words):
        alone = masking(wordpiece)(
            batch_of([lengths], wordpiece), np.array([number]), seed=3, draw=1
        )
        width = sum(lengths) + 2
        assert torch.equal(alone.labels[0, :width], together.labels[number, :width])
