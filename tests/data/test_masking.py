"""Masks: BERT's shares, the same in every run, whatever the ranks, micro-batches and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE, Batch
from megakd.data.collation import Collator
from megakd.data.loader import StepLoader, evaluation_batches
from megakd.data.masking import Masking, task_masking
from megakd.data.step_layout import StepLayout, StepShape

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)
SIZE = 205
ROLES = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
SMALL = st.integers(1, 3)


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{n}" for n in range(SIZE - len(SPECIAL)))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=SPECIAL[UNK]))
    roles = {f"{role}_token": token for role, token in ROLES.items()}
    return PreTrainedTokenizerFast(tokenizer_object=made, **roles)


def task(kind="mlm", **keys) -> TaskConfig:
    return TaskConfig(type=kind, dataset="none", max_length=48, **keys)


def masking(**keys) -> Masking:
    made = task_masking(tokenizer(), task(**keys))
    assert made is not None
    return made


def encoded(count: int, *, longest: int = 40) -> Dataset:
    """Rows of all lengths, as the tokenizer frames them, an unknown token in each tenth."""
    rng = np.random.default_rng(1)
    rows = []
    for number in range(count):
        ids = rng.integers(5, SIZE, size=rng.integers(1, longest)).tolist()
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
    assert torch.equal(masked.targets, chosen.flatten().nonzero()[:, 0])
    assert torch.equal(masked.target_labels, ids_of(plain)[chosen])


def test_the_batch_that_was_given_is_not_changed():
    plain = collated([[CLS, *range(5, 40), SEP]])
    before = ids_of(plain).clone()

    masking()(plain, np.array([0]), seed=1, draw=0)

    assert torch.equal(ids_of(plain), before)
    assert (plain.labels == IGNORE).all()


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
    # A random token may be the one that stood there.
    assert near(int(replaced.sum()), len(shown), 0.1 * (1 - 1 / 200))
    assert near(int(kept.sum()), len(shown), 0.1 * (1 + 1 / 200))


def test_positions_and_random_tokens_are_spread_evenly(many):
    plain, masked = many
    chosen = masked.labels != IGNORE
    replaced = ids_of(masked)[chosen & (ids_of(masked) != MASK) & (ids_of(masked) != ids_of(plain))]

    assert all(near(int(column.sum()), 1000, 0.15) for column in chosen[:, 1:41].T)
    assert len(replaced.unique()) > SIZE - 5 - 20
    assert int(replaced.min()) == 5
    assert int(replaced.max()) >= SIZE - 5


def test_rows_epochs_and_seeds_have_masks_of_their_own():
    row = [CLS, *range(5, 45), SEP]
    batch = collated([row, row])

    masks = [
        masking()(batch, np.array(rows), seed=seed, draw=draw).labels[0]
        for rows, seed, draw in (([0, 1], 1, 0), ([1, 0], 1, 0), ([0, 1], 2, 0), ([0, 1], 1, 1))
    ]

    assert len({tuple(mask.tolist()) for mask in masks}) == 4


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


def test_a_batch_without_any_target_asks_about_one_position_that_counts_nowhere():
    masked = masking()(collated([[CLS, UNK, SEP]], dummy_rows=1), np.array([0]), seed=1, draw=0)

    assert masked.targets.tolist() == [0]
    assert masked.target_labels.tolist() == [IGNORE]


def test_a_share_of_the_config_is_taken():
    plain = collated([[CLS, *range(5, 45), SEP]] * 500)

    masked = masking(mlm_probability=0.4)(plain, np.arange(500), seed=1, draw=0)

    assert near(int((masked.labels != IGNORE).sum()), 500 * 40, 0.4)


@pytest.mark.parametrize("kind", ["classification", "regression", "causal_lm"])
def test_no_other_task_masks(kind):
    assert task_masking(tokenizer(), task(kind)) is None


def loader(rows: Dataset, shape: StepShape, **keys) -> StepLoader:
    return StepLoader(
        rows,
        Collator(tokenizer(), task()),
        layout=StepLayout(shape),
        masking=masking(),
        **{"seed": 3} | keys,
    )


def shown(batches) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every real row's tokens and labels without its padding."""
    return sorted(
        (tuple(ids[valid].tolist()), tuple(labels[valid].tolist()))
        for batch in batches
        for ids, labels, valid in zip(ids_of(batch), batch.labels, batch.valid, strict=True)
        if valid.any()
    )


@given(per_device=SMALL, accumulation=SMALL, world=SMALL, index=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
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


def test_a_resumed_run_sees_the_masks_it_would_have_seen():
    rows = encoded(30)
    through = list(loader(rows, StepShape(4, 1)).iterate(0, 20))
    resumed = list(loader(rows, StepShape(4, 1)).iterate(13, 20))

    assert [shown(step) for step in resumed] == [shown(step) for step in through[13:]]


def test_every_epoch_masks_the_rows_anew():
    steps = [loader(encoded(4), StepShape(4, 1)).step(index) for index in range(3)]

    assert shown(steps[0]) != shown(steps[1]) != shown(steps[2]) != shown(steps[0])


def test_the_masks_of_an_epoch_do_not_depend_on_the_rows_of_a_step():
    rows = encoded(12)

    def of_epoch(size: int) -> list:
        steps = [loader(rows, StepShape(size, 1)).step(index) for index in range(12 // size)]
        return shown(batch for step in steps for batch in step)

    assert of_epoch(2) == of_epoch(3) == of_epoch(12)


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
