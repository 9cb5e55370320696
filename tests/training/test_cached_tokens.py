"""What a cache keeps of a language model's answers, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megakd.config.models import TeacherConfig
from megakd.contract.batch import Batch, TopK
from megakd.errors import TeacherError
from megakd.models.next_tokens import TokenCounts, count_draws, draw
from megakd.training.cached_tokens import ask_tokens, bytes_per_token, kept_facts, whole_answers

LENGTH, VOCABULARY = 6, 40
TOP_K = TeacherConfig(model="a", cache_top_k=5)
DRAWS = TeacherConfig(model="a", cache_draws=4)
BOTH = pytest.mark.parametrize("spec", [TOP_K, DRAWS], ids=["top k", "draws"])


class Teacher:
    """Has the same logits at every position; not finite at the positions of `broken`."""

    def __init__(self, broken: Tensor | None = None) -> None:
        made = torch.Generator().manual_seed(0)
        self.logits, self.broken = torch.randn(VOCABULARY, generator=made), broken

    def draw(self, batch: Batch, numbers: Tensor) -> TokenCounts:
        logits = self._of(batch).flatten(0, 1)
        found = count_draws(draw(logits, numbers.flatten(0, 1)))
        return TokenCounts(*(part.unflatten(0, batch.valid.shape) for part in found))

    def top_k(self, batch: Batch, count: int) -> TopK:
        logprobs, ids = self._of(batch).log_softmax(-1).topk(count)
        return TopK(ids.int(), logprobs)

    def _of(self, batch: Batch) -> Tensor:
        logits = self.logits.expand(*batch.valid.shape, -1)
        return (
            logits if self.broken is None else logits.masked_fill(self.broken[..., None], torch.nan)
        )


def asked(rows: list[int], spec: TeacherConfig = DRAWS, *, length=LENGTH, **facts: Any):
    valid = torch.ones(len(rows), length, dtype=torch.bool)
    valid[:, -1] = False
    batch = Batch({}, valid.long(), valid, rows=torch.tensor(rows))
    teacher: Any = Teacher(**facts)
    return ask_tokens(teacher, batch, spec, length=LENGTH)


def test_draws_depend_on_the_row_and_the_seed_and_not_on_the_batch_around_it():
    together, one = asked([3, 9, 12]), asked([9])
    other = TeacherConfig(model="a", cache_draws=4, cache_seed=1)

    for name in ("ids", "counts"):
        assert torch.equal(together[name][1], one[name][0])
    assert not torch.equal(together["ids"][0], together["ids"][1])
    assert not torch.equal(one["ids"], asked([9], other)["ids"])


def test_draws_depend_on_the_position_and_not_on_the_length_of_the_batch():
    longer, shorter = asked([3]), asked([3], length=4)

    assert torch.equal(longer["ids"][:, :4], shorter["ids"][:, :4])
    assert (shorter["ids"][:, 4:] == -1).all()
    assert (shorter["counts"][:, 4:] == 0).all()
    assert len({tuple(ids) for ids in longer["ids"][0].tolist()}) > LENGTH // 2


@BOTH
def test_a_position_takes_the_bytes_that_are_announced(spec):
    found = whole_answers(asked([0, 1], spec), first=0)

    assert sum(part.nbytes for part in found.values()) == 2 * LENGTH * bytes_per_token(spec)


@BOTH
def test_answers_that_are_not_finite_are_refused_naming_the_row(spec):
    broken = torch.zeros(3, LENGTH, dtype=torch.bool)
    broken[1, 2] = True

    with pytest.raises(TeacherError, match="not finite for training row 101"):
        whole_answers(asked([100, 101, 102], spec, broken=broken), first=100)


@BOTH
def test_answers_at_padding_may_be_anything(spec):
    broken = torch.zeros(1, LENGTH, dtype=torch.bool)
    broken[0, -1] = True

    found = whole_answers(asked([0], spec, broken=broken), first=0)

    assert set(found) in ({"ids", "logprobs"}, {"ids", "counts"})


def test_caches_of_the_two_kinds_have_other_facts():
    assert kept_facts(TOP_K) == {"top_k": 5}
    assert kept_facts(DRAWS) == {"draws": 4, "draws_seed": 0}
