"""Masks of tokens and of words: BERT's shares, the same in every run, however a step is cut."""

from __future__ import annotations

from functools import cache
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
from megakd.data.loader import StepLoader, evaluation_batches
from megakd.data.masking import Masking, task_masking
from megakd.data.step_layout import StepLayout, StepShape
from megakd.data.token_tables import WORD_STARTS, check_words, word_starts
from megakd.data.vocabularies import train_tokenizer
from megakd.errors import DataError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)
SIZE = 205
ROLES = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
SMALL = st.integers(1, 3)


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{n}" for n in range(SIZE - len(SPECIAL)))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=SPECIAL[UNK]))
    return PreTrainedTokenizerFast(tokenizer_object=made, **ROLES)


def task(kind="mlm", **keys) -> TaskConfig:
    return TaskConfig(**{"type": kind, "dataset": "none", "max_length": 48} | keys)


def masking(**keys) -> Masking:
    return task_masking(tokenizer(), task(**keys))


def encoded(count: int) -> Dataset:
    """Rows of all lengths, as the tokenizer frames them, an unknown token in each tenth."""
    rng = np.random.default_rng(1)
    rows = []
    for number in range(count):
        ids = rng.integers(5, SIZE, size=rng.integers(1, 40)).tolist()
        rows.append([CLS, *([UNK] if number % 10 == 0 else []), *ids, SEP])
    return Dataset.from_dict({"input_ids": rows})


def collated(rows: list[list[int]], *, dummy_rows: int = 0) -> Batch:
    given_rows = [{"input_ids": row} for row in rows]
    return Collator(tokenizer(), task())(given_rows, dummy_rows=dummy_rows)


def ids_of(batch: Batch) -> torch.Tensor:
    return batch.inputs["input_ids"]


@pytest.fixture(scope="module")
def many() -> tuple[Batch, Batch]:
    """A batch of 40,000 tokens before and after masking."""
    rng = np.random.default_rng(0)
    plain = collated([[CLS, *rng.integers(5, SIZE, size=40).tolist(), SEP] for _ in range(1000)])
    return plain, masking()(plain, np.arange(1000), seed=1, draw=0)


def test_labels_are_what_stood_under_the_masks_and_nothing_is_shifted(many):
    plain, masked = many
    chosen = masked.labels != IGNORE

    assert torch.equal(masked.labels[chosen], ids_of(plain)[chosen])
    assert torch.equal(ids_of(masked)[~chosen], ids_of(plain)[~chosen])
    assert plain.labels.eq(IGNORE).all()  # the batch that was given is not changed
    assert torch.equal(masked.targets, chosen.flatten().nonzero()[:, 0])
    assert torch.equal(masked.target_labels, ids_of(plain)[chosen])


# Five standard deviations of a share p among n: 5 sqrt(p (1 - p) / n).
def near(count: int, of: int, share: float) -> bool:
    return abs(count / of - share) < 5 * (share * (1 - share) / of) ** 0.5


def test_15_percent_are_chosen_and_of_these_80_10_10_are_masked_replaced_and_kept(many):
    plain, masked = many
    chosen = masked.labels != IGNORE
    shown, truth = ids_of(masked)[chosen], ids_of(plain)[chosen]
    hidden, kept = shown == MASK, shown == truth
    replaced = ~hidden & ~kept

    assert near(int(chosen.sum()), 40_000, 0.15)
    assert near(int(hidden.sum()), len(shown), 0.8)
    # A random token may equal the original token.
    assert near(int(replaced.sum()), len(shown), 0.1 * (1 - 1 / 200))
    assert near(int(kept.sum()), len(shown), 0.1 * (1 + 1 / 200))
    # Positions and random tokens are spread evenly.
    assert all(near(int(column.sum()), 1000, 0.15) for column in chosen[:, 1:41].T)
    tokens = shown[replaced].unique()
    assert len(tokens) > SIZE - 5 - 20
    assert (int(tokens.min()), int(tokens.max()) >= SIZE - 5) == (5, True)


def test_special_tokens_and_padding_are_never_chosen():
    rows = encoded(300)["input_ids"][:]
    plain = collated(rows, dummy_rows=2)

    masked = masking(mlm_probability=1.0)(plain, np.arange(300), seed=1, draw=0)

    special = ids_of(plain) < 5
    assert torch.equal(masked.labels != IGNORE, plain.valid & ~special)
    assert torch.equal(ids_of(masked)[special], ids_of(plain)[special])
    replaced = ids_of(masked)[(masked.labels != IGNORE) & (ids_of(masked) != MASK)]
    assert int(replaced.min()) >= 5  # no special token stands at random either


def test_a_row_has_at_least_one_target_if_any_of_its_tokens_may_be_one():
    rows = [[CLS, 7, SEP], [CLS, *range(5, 45), SEP], [CLS, UNK, SEP], [CLS, SEP]]

    masked = masking(mlm_probability=1e-6)(collated(rows), np.arange(4), seed=1, draw=0)

    assert (masked.labels != IGNORE).sum(dim=1).tolist() == [1, 1, 0, 0]
    # A batch without a target asks about a position that counts nowhere.
    blank = masking()(collated(rows[2:], dummy_rows=1), np.arange(2), seed=1, draw=0)
    assert (blank.targets.tolist(), blank.target_labels.tolist()) == ([0], [IGNORE])
    assert task_masking(tokenizer(), task("causal_lm")) is None


def loader(rows: Dataset, shape: StepShape, seed: int = 3) -> StepLoader:
    collate = Collator(tokenizer(), task())
    return StepLoader(rows, collate, layout=StepLayout(shape), masking=masking(), seed=seed)


def shown(batches) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every real row's tokens and labels without its padding."""
    return sorted(
        (tuple(ids[valid].tolist()), tuple(labels[valid].tolist()))
        for batch in batches
        for ids, labels, valid in zip(ids_of(batch), batch.labels, batch.valid, strict=True)
        if valid.any()
    )


@given(per_device=SMALL, accumulation=SMALL, world=SMALL, index=st.integers(0, 9))
@settings(max_examples=15)
def test_the_cut_into_ranks_and_micro_batches_changes_no_mask(
    per_device, accumulation, world, index
):
    rows = encoded(23)
    whole = loader(rows, StepShape(per_device * accumulation * world, 1)).step(index)
    dealt = [
        batch
        for rank in range(world)
        for batch in loader(rows, StepShape(per_device, accumulation, rank, world)).step(index)
    ]

    assert shown(dealt) == shown(whole)


def test_the_masks_of_an_epoch_are_its_own_whatever_the_rows_and_the_beginning_of_a_step():
    rows = encoded(12)

    def of_epoch(size: int, epoch: int = 0, seed: int = 3) -> list:
        count = 12 // size
        made = loader(rows, StepShape(size, 1), seed=seed)
        return shown(b for step in made.iterate(epoch * count, (epoch + 1) * count) for b in step)

    assert of_epoch(2) == of_epoch(3) == of_epoch(12)
    assert of_epoch(2, 1) == of_epoch(4, 1)
    masks = [of_epoch(3), of_epoch(3, 1), of_epoch(3, 2), of_epoch(3, seed=4)]
    assert all(masks.count(mask) == 1 for mask in masks)
    same = collated([[CLS, *range(5, 45), SEP]] * 2)
    labels = masking()(same, np.arange(2), seed=1, draw=0).labels
    assert not torch.equal(labels[0], labels[1])


def test_an_evaluation_has_the_same_masks_every_time_on_any_ranks():
    rows, collate = encoded(11), Collator(tokenizer(), task())

    def seen(world: int, size: int) -> list:
        return shown(
            batch
            for rank in range(world)
            for batch in evaluation_batches(
                rows, collate, batch_size=size, rank=rank, world=world, masking=masking()
            )
        )

    assert seen(1, 11) == seen(1, 3) == seen(2, 2) == seen(3, 4)
    assert any(labels.count(IGNORE) < len(labels) for _, labels in seen(1, 11))


def test_masks_stay_what_they_are():
    """Written down: a later version resumes a run with the masks that it has begun with."""
    row = [CLS, *range(5, 45), SEP]

    masked = masking(mlm_probability=0.3)(collated([row]), np.array([9]), seed=7, draw=5)

    assert masked.target_labels.tolist() == [8, 23, 24, 26, 28, 31, 35, 38, 42, 44]
    shown_there = ids_of(masked)[masked.labels != IGNORE].tolist()
    assert shown_there == [MASK, MASK, MASK, MASK, 28, MASK, MASK, MASK, MASK, MASK]


TEXT = "the unbelievable cats, it isn't naïve"
WORDS = {
    "wordpiece": "the|unbelievable|cats|,|it|isn|'|t|naïve",
    "bpe": "the|unbelievable|cats|,|it|isn|'t|naïve",
    "unigram": "the|unbelievable|cats,|it|isn't|naïve",
}


@cache
def trained(kind: Any) -> PreTrainedTokenizerFast:
    letters = [*TEXT, "abcdefghijklmnopqrstuvwxyz", "able cat the it is"] * 3
    return train_tokenizer(lambda: letters, kind=kind, vocab_size=300, for_encoder=True)


def words_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The text of each word, as the offsets of its tokens have it."""
    spelled = tokenizer([text], add_special_tokens=False)
    (starts,) = word_starts(spelled, [text])
    spans = spelled.encodings[0].offsets
    firsts = [spans[p][0] for p, start in enumerate(starts) if p == start]
    return [text[a:b] for a, b in zip(firsts, [*firsts[1:], len(text)], strict=True)]


@pytest.mark.parametrize("kind", list(WORDS))
def test_a_word_is_what_the_tokenizer_cuts_off_before_it_looks_for_pieces(kind):
    made = trained(kind)

    assert "|".join(word.strip() for word in words_of(made, TEXT)) == WORDS[kind]
    if kind == "wordpiece":  # a special token is a word of its own
        assert words_of(made, "cats[MASK]cats") == ["cats", "[MASK]", "cats"]


def test_pieces_of_a_tokenizer_without_words_are_cut_at_white_space():
    made = Tokenizer(models.BPE({c: n for n, c in enumerate("▁abcd")}, []))
    made.normalizer = normalizers.Replace(" ", "▁")

    result = words_of(PreTrainedTokenizerFast(tokenizer_object=made), "ab cad d")

    assert result == ["ab", " cad", " d"]


def test_a_tokenizer_that_does_not_tell_words_is_refused_with_the_key():
    with pytest.raises(DataError, match=r"whole_word_masking: the tokenizer is a Words, .*use a"):
        check_words(Words())


def word_task(**keys: Any) -> TaskConfig:
    return task(**{"max_length": 12, "whole_word_masking": True} | keys)


def encoded_words(
    texts: list[str], folder: Any, tokenizer: Any, **keys: Any
) -> tuple[Dataset, str]:
    rows, task = {"train": Dataset.from_dict({"text": texts})}, word_task(**keys)
    made, key = encode_rows(rows, tokenizer, task, content_hash="same", cache_dir=folder)
    return made["train"], key


def test_words_are_written_only_with_the_option_under_a_key_of_their_own(tmp_path):
    tokenizer = trained("wordpiece")
    plain, plain_key = encoded_words([TEXT], tmp_path, tokenizer, whole_word_masking=False)
    words, key = encoded_words([TEXT], tmp_path, tokenizer)

    assert plain.column_names == ["input_ids"]
    assert words.column_names == ["input_ids", WORD_STARTS]
    assert plain["input_ids"][:] == words["input_ids"][:]
    assert key != plain_key


@given(
    texts=st.lists(st.text("abc ,\n", min_size=1, max_size=60), min_size=1, max_size=4),
    kind=st.sampled_from(list(WORDS)),
    length=st.integers(4, 20),
)
@settings(max_examples=10)
def test_every_row_counts_its_words_from_its_own_start(tmp_path_factory, texts, kind, length):
    tokenizer = trained(kind)
    texts = [f"cats {text}" for text in texts]
    rows, _ = encoded_words(texts, tmp_path_factory.mktemp("cache"), tokenizer, max_length=length)

    for ids, starts in zip(rows["input_ids"], rows[WORD_STARTS], strict=True):
        assert len(starts) == len(ids) <= length
        assert all(starts[start] == start <= place for place, start in enumerate(starts))
        assert starts == sorted(starts)
        assert starts[:2] == [0, 1]  # [CLS] is a word of its own, and so is [SEP]
        assert starts[-1] == len(ids) - 1


def batch_of(words: list[list[int]], *, dummy_rows: int = 0) -> Batch:
    """One row per list of lengths of words; the tokens are any that may be masked."""
    rows = []
    for lengths in words:
        starts = [0]
        for length in lengths:
            starts += [len(starts)] * length
        ids = [2, *range(10, 10 + len(starts) - 1), 3]
        rows.append({"input_ids": ids, WORD_STARTS: [*starts, len(starts)]})
    return Collator(trained("wordpiece"), word_task(max_length=512))(rows, dummy_rows=dummy_rows)


def by_words(**keys: Any) -> Masking:
    return task_masking(trained("wordpiece"), word_task(**keys))


LENGTHS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=20), min_size=1, max_size=4)


@given(words=LENGTHS, seed=st.integers(0, 99), draw=st.integers(0, 3))
@settings(max_examples=20)
def test_all_pieces_of_a_word_are_chosen_or_none(words, seed, draw):
    plain = batch_of(words, dummy_rows=1)
    masked = by_words()(plain, np.arange(len(words)), seed=seed, draw=draw)

    assert WORD_STARTS in plain.inputs
    assert WORD_STARTS not in masked.inputs  # no model takes it
    for chosen, starts, lengths in zip(
        masked.labels != IGNORE, plain.inputs[WORD_STARTS], words, strict=False
    ):
        assert torch.equal(chosen[: sum(lengths) + 2], chosen[starts][: sum(lengths) + 2])
        assert chosen.any()
        assert not chosen[0]


def test_each_piece_of_a_chosen_word_is_masked_replaced_or_kept_for_itself():
    plain = batch_of([[4] * 10] * 500)
    masked = by_words(mlm_probability=0.2)(plain, np.arange(500), seed=1, draw=0)
    chosen = masked.labels != IGNORE
    by_word = (ids_of(masked) == trained("wordpiece").mask_token_id)[chosen].reshape(-1, 4)

    assert near(len(by_word), 5000, 0.2)
    assert near(int(by_word.sum()), by_word.numel(), 0.8)
    assert near(int(by_word.all(dim=1).sum()), len(by_word), 0.8**4)


def test_words_of_one_token_have_the_masks_of_tokens():
    with_words = batch_of([[1] * 30] * 5)
    inputs = {k: v for k, v in with_words.inputs.items() if k != WORD_STARTS}

    words, tokens = (
        by_words()(batch, np.arange(5), seed=1, draw=2)
        for batch in (with_words, with_words._replace(inputs=inputs))
    )

    assert torch.equal(words.labels, tokens.labels)
    assert torch.equal(ids_of(words), ids_of(tokens))
