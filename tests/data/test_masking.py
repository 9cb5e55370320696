"""Masks of tokens: BERT's shares, the same in every run, however a step is cut."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megakd.config.task import TaskConfig
from megakd.data.batch import IGNORE, Batch
from megakd.data.collation import Collator, Masking, task_masking
from megakd.data.loader import StepLayout, StepLoader, StepShape, evaluation_batches

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)
SIZE = 205
ROLES = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
SMALL = st.integers(1, 3)


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{n}" for n in range(SIZE - len(SPECIAL)))]
    numbers = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(numbers, unk_token=SPECIAL[UNK]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES)


def task(kind="mlm", **keys) -> TaskConfig:
    return TaskConfig(**{"type": kind, "dataset": "none", "max_length": 48} | keys)


def masking(**keys) -> Masking:
    return task_masking(tokenizer(), task(**keys))


def encoded(count: int) -> Dataset:
    """Rows of all lengths, as the tokenizer frames them, an unknown token in each tenth."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(5, SIZE, size=rng.integers(1, 40)).tolist() for _ in range(count)]
    rows = [[CLS, *[UNK] * (n % 10 == 0), *ids, SEP] for n, ids in enumerate(texts)]
    return Dataset.from_dict({"input_ids": rows})


def collated(rows: list[list[int]], *, dummy_rows: int = 0) -> Batch:
    return Collator(tokenizer(), task())([{"input_ids": r} for r in rows], dummy_rows=dummy_rows)


def ids_of(batch: Batch) -> torch.Tensor:
    return batch.inputs["input_ids"]


@pytest.fixture(scope="module")
def many() -> tuple[Batch, Batch]:
    """A batch of 40,000 tokens before and after masking."""
    rng = np.random.default_rng(0)
    plain = collated([[CLS, *rng.integers(5, SIZE, size=40).tolist(), SEP] for _ in range(1000)])
    return plain, masking()(plain, np.arange(1000), seed=1, draw=0)


def test_labels_are_what_stood_under_the_masks_and_the_rest_stays_as_it_is(many):
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
def test_ranks_and_micro_batches_change_no_mask(per_device, accumulation, world, index):
    rows = encoded(23)
    whole = loader(rows, StepShape(per_device * accumulation * world, 1)).step(index)
    shapes = (StepShape(per_device, accumulation, rank, world) for rank in range(world))

    dealt = [batch for shape in shapes for batch in loader(rows, shape).step(index)]

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
        options = {"batch_size": size, "world": world, "masking": masking()}
        ranks = (evaluation_batches(rows, collate, rank=n, **options) for n in range(world))
        return shown(chain.from_iterable(ranks))

    assert seen(1, 11) == seen(1, 3) == seen(2, 2) == seen(3, 4)
    assert any(labels.count(IGNORE) < len(labels) for _, labels in seen(1, 11))


def test_masks_stay_what_they_are():
    """Written down: a later version resumes a run with the masks that it has begun with."""
    row = [CLS, *range(5, 45), SEP]

    masked = masking(mlm_probability=0.3)(collated([row]), np.array([9]), seed=7, draw=5)

    assert masked.target_labels.tolist() == [8, 23, 24, 26, 28, 31, 35, 38, 42, 44]
    shown_there = ids_of(masked)[masked.labels != IGNORE].tolist()
    assert shown_there == [MASK, MASK, MASK, MASK, 28, MASK, MASK, MASK, MASK, MASK]
