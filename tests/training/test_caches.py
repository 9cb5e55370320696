"""Caches of answers: what they keep, row by row, and which students they can teach."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_runs import llama, run_in
from torch import Tensor

from megakd.config.file import load_config
from megakd.config.sections import ScratchModel, TeacherConfig
from megakd.data.batch import Batch, TopK
from megakd.errors import ConfigError, TeacherError
from megakd.models.draws import TokenCounts, count_draws, draw
from megakd.models.loading import resolve_model
from megakd.training.inputs import check_caches
from megakd.training.served_teachers import ask_tokens, bytes_per_token, whole_answers

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
        result = count_draws(draw(logits, numbers.flatten(0, 1)))
        return TokenCounts(*(part.unflatten(0, batch.valid.shape) for part in result))

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


def test_draws_depend_on_row_and_position_and_not_on_the_batch_around_them():
    ids, counts = (asked([3, 9])[name] for name in ("ids", "counts"))
    shorter = asked([9], length=4)

    assert torch.equal(ids[1:, :4], shorter["ids"][:, :4])
    assert torch.equal(counts[1:, :4], shorter["counts"][:, :4])
    assert (shorter["ids"][:, 4:] == -1).all()
    assert (shorter["counts"][:, 4:] == 0).all()
    assert not torch.equal(ids[0], ids[1])
    assert len({tuple(drawn) for drawn in ids[0].tolist()}) > LENGTH // 2


@BOTH
def test_a_position_takes_the_announced_bytes_and_answers_at_padding_may_be_anything(spec):
    broken = torch.zeros(2, LENGTH, dtype=torch.bool)
    broken[:, -1] = True

    result = whole_answers(asked([0, 1], spec, broken=broken), first=0)

    assert set(result) in ({"ids", "logprobs"}, {"ids", "counts"})
    assert sum(part.nbytes for part in result.values()) == 2 * LENGTH * bytes_per_token(spec)


@BOTH
def test_answers_that_are_not_finite_are_refused_naming_the_row(spec):
    broken = torch.zeros(3, LENGTH, dtype=torch.bool)
    broken[1, 2] = True

    with pytest.raises(TeacherError, match="not finite for training row 101"):
        whole_answers(asked([100, 101, 102], spec, broken=broken), first=100)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def checked(tmp_path, family, teacher, **keys):
    """Checks a run whose teacher is cached or served and whose student is of a family."""
    path = run_in(
        tmp_path,
        {"type": "causal_lm", "dataset": "texts"},
        teacher={"model": llama(2), **teacher},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl"}],
    )
    config = load_config(path)
    spec = ScratchModel(config={"model_type": family, **SIZES, **keys})
    check_caches(config, resolve_model(spec, config.task, where="student.model"))


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("gemma2", {}, r"gemma2 student .*softcap=30\.0"),
        ("granite", {"logits_scaling": 0.5}, r"granite student .*scale=2\.0"),
        ("llama", {}, None),
        ("gemma3_text", {}, None),
        ("gemma2", {"final_logit_softcapping": None}, None),
        ("granite", {"logits_scaling": 1.0}, None),
    ],
)
def test_a_student_with_a_cap_or_a_factor_is_refused(tmp_path, family, keys, message):
    served = {"model": "served", "server": {"url": ["http://a:1"]}}
    for kind, teacher in (("cache", {"cache": "answers"}), ("server", served)):
        refused = pytest.raises(ConfigError, match=f"^teacher.{kind}: the {message}")
        with refused if message else nullcontext():
            checked(tmp_path, family, teacher, **keys)
    checked(tmp_path, family, {}, **keys)
